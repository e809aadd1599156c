"""What is asked of the installed versions, and what is said of what one cannot do."""

import megatron.core.optimizer as optimizer
import pytest

from nemo_minitron.errors import EngineError
from nemo_minitron.packages import versions


def test_keywords_that_a_function_lacks_are_left_out():
    def function(one, two=2):
        return one, two

    assert function(1, **versions.known_keywords(function, two=3, three=4)) == (1, 3)


def test_the_optimizer_is_made_without_keywords_that_megatron_dropped(monkeypatch):
    """As of Core 0.16, which has none of the three; only what changes nothing is left out."""

    def core_016(config, model_chunks, config_overrides=None, use_gloo_process_groups=True):
        return config, model_chunks, use_gloo_process_groups

    neutral = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", core_016)
    with versions.optimizer_as_nemo_asks():
        assert optimizer.get_megatron_optimizer(1, 2, use_gloo_process_groups=False, **neutral) == (1, 2, False)
        with pytest.raises(EngineError, match="has no lr_mult"):
            optimizer.get_megatron_optimizer(1, 2, **neutral | {"lr_mult": 0.5})
    assert optimizer.get_megatron_optimizer is core_016


def test_megatron_cores_source_is_read_without_an_import():
    assert "class MLP" in versions.core_source("transformer/mlp.py")
    assert versions.core_source("transformer/nothing.py") is None
