"""ModelOpt's dynamic modules for the norms and the attention of the local layer spec.

ModelOpt 0.43 has none for RMSNorm, and its own for torch.nn.LayerNorm takes no shared size. Both are
registered for the body of a ``with`` and taken back afterwards.

ModelOpt 0.41 and later hand a model's shared size to each norm; before, a norm is converted with a size of its own, in
whose place the shared one is put afterwards.

ModelOpt puts a class of its own, made from Megatron's DotProductAttention, on the attention: there it would work out
all scores, and know of no window with Megatron Core before 0.15.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def local_norms_prunable() -> Iterator[None]:
    """Lets ModelOpt's Minitron pruning cut the torch norms of a local-spec Megatron model, and keep its attention."""
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.plugins import megatron
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.nas.traced_hp import TracedHp
    from torch import nn

    from nemo_minitron.megatron.attention import TorchAttention
    from nemo_minitron.megatron.local_layers import RMSNorm

    class _DynamicTorchNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: TracedHp | None = None) -> None:
            own = TracedHp(list(range(1, self.normalized_shape[-1] + 1)))
            self._register_hparam("num_features", own if num_features is None else num_features)
            for name in ("weight", "bias"):
                if hasattr(self, name):
                    self._register_dynamic_attribute(name, self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    had_layer_norm = nn.LayerNorm in DMRegistry
    if had_layer_norm:
        DMRegistry.unregister(nn.LayerNorm)
    norms = {nn.RMSNorm: "nn.RMSNorm", RMSNorm: "nemo_minitron.RMSNorm", nn.LayerNorm: "nn.LayerNorm"}
    DMRegistry.register(norms)(_DynamicTorchNorm)
    attention, megatron.DotProductAttention = megatron.DotProductAttention, TorchAttention
    try:
        yield
    finally:
        megatron.DotProductAttention = attention
        for norm in norms:
            DMRegistry.unregister(norm)
        if had_layer_norm:
            DMRegistry.register({nn.LayerNorm: "nn.LayerNorm"})(_DynamicLayerNorm)
