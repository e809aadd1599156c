"""Checkpoints on disk, of any format, in one view: architecture, tensors by Megatron's names, tokenizer.

`checkpoint` opens one; `formats` holds a module for each format, `storage` the kinds of files that they are made of.
Nothing here imports NeMo or Megatron, no weight is read before it is asked for, and what is read is untrusted.
"""
