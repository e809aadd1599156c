"""Megatron Core as this package runs it: the session, the model's configuration, layouts, weights,
layers of the local spec, and passes forward without a trainer.

Everything that depends on how Megatron works inside stands here. Imports launch, checkpoints and what lies below.
"""
