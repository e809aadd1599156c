"""Corpora: read, tokenised, and handed to training as samples; `minitron data`.

Imports megatron, for its indexed format, and what lies below.
"""
