"""Stand-in for Transformer Engine on PyTorch, for tests on machines without CUDA, where the real one does not build.

The names, arithmetic, parallel communication and extra states of what Megatron's extension uses of it for dense GPT
models, written with plain PyTorch operations in fp32. It has no FP8, no grouped layers and no fused kernels; asked for
them it raises NotImplementedError. Its version ends in ``+cpu``.
"""

from transformer_engine import common, pytorch

__version__ = "2.5.0+cpu"
__all__ = ["common", "pytorch"]
