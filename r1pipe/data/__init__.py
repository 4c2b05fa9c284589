"""Where prompts and demonstrations come from: files, reasoning-gym, and the bundled world."""
