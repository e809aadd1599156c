"""Layouts: what cannot work is refused with the equation that fails."""

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import ModelConfig, TrainerConfig, layout_problems
from nemo_minitron.errors import EngineError
from nemo_minitron.megatron.layout import Layout, check_fits, check_length, layout_of
from nemo_minitron.megatron.session import uneven_stages

LLAMA = Architecture(
    num_layers=4, hidden_size=128, ffn_hidden_size=256, num_attention_heads=6, num_query_groups=2, kv_channels=32,
    vocab_size=512,
)  # fmt: skip


def test_sizes_that_do_not_divide_are_named_together():
    with pytest.raises(EngineError) as caught:
        check_fits(LLAMA, Layout(cuda=False, bf16=False, tensor_parallel=4, pipeline_parallel=8), "teacher")
    message = str(caught.value)
    assert "teacher" in message and "6 mod 4 = 2" in message and "num_query_groups 2" in message
    assert "4 layers cannot be spread over 8" in message


def test_samples_that_do_not_divide_are_refused():
    layout = Layout(cuda=True, bf16=True, devices=8, tensor_parallel=2, context_parallel=4, sequence_parallel=True)
    check_length(4096, layout)
    check_length(100, Layout(cuda=False, bf16=False, devices=2, tensor_parallel=2))
    with pytest.raises(EngineError, match="100 mod 16 = 4.*seq_length=96"):
        check_length(100, layout)


def test_gpus_that_are_not_there_are_refused():
    with pytest.raises(EngineError, match="accelerator=cpu"):
        layout_of(TrainerConfig(accelerator="gpu", devices=64), ModelConfig())


def test_sequence_parallel_needs_transformer_engine_here():
    with pytest.raises(EngineError, match="Transformer Engine"):
        layout_of(TrainerConfig(accelerator="cpu", devices=2), ModelConfig(sequence_parallel=True))


@pytest.mark.parametrize(
    ("trainer", "model", "expected"),
    [
        ({"devices": 3}, {"tensor_model_parallel_size": 2}, "world size 3"),
        ({"devices": 2}, {"global_batch_size": 9, "micro_batch_size": 4}, "multiple of micro_batch_size"),
        ({"devices": 1}, {"sequence_parallel": True}, "sequence_parallel"),
    ],
)
def test_layout_problems(trainer, model, expected):
    (problem,) = layout_problems(TrainerConfig(**trainer), ModelConfig(**model))
    assert expected in problem


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("layers", range(4, 12))
def test_uneven_stages_hold_all_layers(layers, stages):
    sizes = uneven_stages(layers, stages)
    first = sizes.get("num_layers_in_first_pipeline_stage")
    last = sizes.get("num_layers_in_last_pipeline_stage")
    given = [size for size in (first, last) if size is not None]
    rest = layers - sum(given)
    others = stages - len(given)
    assert all(size > 0 for size in given)
    assert rest % others == 0 if others else rest == 0
