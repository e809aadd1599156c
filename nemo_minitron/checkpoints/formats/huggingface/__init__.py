"""Hugging Face directories: the table of families, config.json, names of tensors, and how weights are quantised."""
