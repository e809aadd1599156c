"""Checkpoints from one format to another, and what a user asks of one: convert, inspect, download, verify.

`sources` has a module for each place that downloads come from, `gguf` what makes a Hugging Face directory of a GGUF.

Verification runs models, so this stands above megatron; how a format is laid out is checkpoints' business.
"""
