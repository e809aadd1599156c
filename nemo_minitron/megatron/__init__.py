"""Megatron Core as this package runs it: the session, the model's configuration, layouts, ranks, weights, attention.

Everything that depends on how Megatron works inside stands here. Imports launch, checkpoints and what lies below.
"""
