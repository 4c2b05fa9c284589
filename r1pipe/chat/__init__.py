"""The chat format: its template and its tokenizer."""
