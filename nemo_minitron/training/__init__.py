"""Training a model with NeMo's trainer: its data, its model, the loop, losses, history, and `minitron finetune`.

Imports megatron, data, conversion and what lies below. The other stages build on it; it knows none of them.
"""
