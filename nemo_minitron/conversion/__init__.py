"""Checkpoints from one format to another, and what a user asks of one: convert, inspect, download, verify.

Verification runs models, so this stands above megatron; how a format is laid out is checkpoints' business.
"""
