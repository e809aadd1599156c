"""GGUF, llama.cpp's format: header and metadata (`header`), types of numbers (`numbers`), the table of architectures
(`families`), what metadata say of a model (`config`), its tensors (`mapping`), its tokenizer (`tokenizer`), and files,
whole or split (`file`).

Source of the format and of the keys' meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
