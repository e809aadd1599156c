"""Losses between two models' outputs as functions of tensors, whole, in chunks, and fused with the output layer.

No engine is known here but torch.
"""
