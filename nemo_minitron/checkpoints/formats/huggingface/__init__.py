"""Hugging Face directories: one table for each family, how weights are quantised, and transformers' own model."""
