"""Checkpoints on disk, of any format, in one view: architecture, tensors by Megatron's names, tokenizer.

`checkpoint` opens and writes one; `formats` has a folder for each format and the table of them, `storage` the kinds of
files that they are made of; `transformers_model` makes transformers' model of one. Nothing here imports NeMo or
Megatron, but the functions of `formats.nemo2.engine`; no weight is read before it is asked for, and what is read is
untrusted. Imports architecture, config and what lies below.
"""
