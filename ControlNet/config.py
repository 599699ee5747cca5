"""The published scripts' settings."""

save_memory = False
