"""The chat format: writing prompts with the template, taking responses apart."""
