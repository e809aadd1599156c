"""Attention without Transformer Engine in whole models and on tensor-parallel ranks; sliding windows among them."""

import pytest
import torch
import transformers

import models
from attentions import LENGTH, SIZE, Made, core_attention, drawn, plain
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.megatron import attention
from nemo_minitron.megatron.layout import Layout

CPU = Layout(cuda=False, bf16=False)


def test_a_tensor_parallel_rank_attends_with_its_heads(tmp_path):
    """Ranks one after another; torch's fake process group stands for the other one."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_minitron.megatron.session import engine

    _, inputs = drawn()
    parts = []
    for rank in range(2):
        with engine(1, tmp_path / "log"):
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
            parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
            parts.append(core_attention("torch")(*(tensor.chunk(2, dim=2)[rank] for tensor in inputs), None))
    hidden = attention.outside(LENGTH, LENGTH, LENGTH, torch.device("cpu"))
    assert torch.allclose(torch.cat(parts, dim=2), plain(*inputs, hidden, SIZE**-0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("block", [16, 1024])
def test_a_windowed_model_computes_what_transformers_does(tmp_path, monkeypatch, block, refuses):
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    monkeypatch.setattr(attention, "BLOCK", block)
    if refuses:  # as Megatron Core before 0.15
        monkeypatch.setattr(attention, "local_attention_takes_windows", lambda: False)
    folder = models.save("mistral-window", torch.float32, tmp_path / "hf")
    checkpoint = open_checkpoint(folder)
    tokens = torch.randint(0, 259, (2, 40), generator=torch.Generator().manual_seed(1))  # [b, s], five windows
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(tokens).logits
        with engine(1, tmp_path / "log"), parallel_ranks(CPU, 1):
            model = load_model(checkpoint.architecture, CPU, checkpoint, local_spec=True).eval()
            got = model(tokens, torch.arange(40).expand(2, 40), None)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral-window", "qwen3", "llama31", "nemotron"])
def test_packed_rows_are_what_they_are_alone(tmp_path, name):
    """Losses by transformers in float64, gradients by Megatron on each row alone; windows, norms of heads, Llama 3.1's
    positions."""
    from nemo_minitron.data.sample_module import boundaries, filled
    from nemo_minitron.data.sample_sets import Piece
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine, forward_step

    folder = models.save(name, torch.float32, tmp_path / "hf")
    checkpoint, chance = open_checkpoint(folder), torch.Generator().manual_seed(1)
    rows = [
        Piece(torch.randint(0, 256, (labels + 1,), generator=chance), torch.rand(labels + 1, generator=chance) < 0.6)
        for labels in (21, 2, 30)
    ]

    def learnt(model, pieces, length):
        item = filled(pieces, length, 0) | (boundaries(pieces, length) if len(pieces) > 1 else {})
        batch = {name: value[None] for name, value in item.items()}
        model.zero_grad()
        losses = forward_step(model, batch)  # [1, s]
        (losses * batch["loss_mask"]).sum().backward()
        return losses.detach()[0], {name: value.grad.clone() for name, value in model.named_parameters()}

    with engine(1, tmp_path / "log"), parallel_ranks(CPU, 1):
        model = load_model(checkpoint.architecture, CPU, checkpoint, local_spec=True)
        packed, gradients = learnt(model, rows, 64)
        alone = [learnt(model, [row], len(row.ids) - 1) for row in rows]
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    start = 0
    for row, (losses, _) in zip(rows, alone):
        own = packed[start : start + len(losses)]
        with torch.no_grad():
            logits = reference(row.ids[None, :-1]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, row.ids[1:], reduction="none").float()
        assert torch.allclose(own, losses, atol=2e-5) and torch.allclose(own, expected, atol=1e-4)
        start += len(losses)
    for parameter, gradient in gradients.items():
        expected = sum(each[parameter] for _, each in alone)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), parameter


@pytest.mark.parametrize("name", ["llama2", "llama31", "mistral-window"])
def test_scoring_makes_no_scores(tmp_path, monkeypatch, name):
    """ModelOpt puts its own class on the attention; ours has to be what runs."""
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.pruning.importance.scoring import collect

    monkeypatch.setattr(attention, "BLOCK", 64)
    length = 512
    checkpoint = open_checkpoint(models.save(name, torch.float32, tmp_path / "hf", num_hidden_layers=4))
    tokens = torch.randint(0, 256, (1, length + 1), generator=torch.Generator().manual_seed(1))
    with engine(1, tmp_path / "log"), parallel_ranks(CPU, 1):
        model = load_model(checkpoint.architecture, CPU, checkpoint, local_spec=True)
        with Made() as made:
            collect(model, tokens, 1, statistics=True)
    assert any("flash_attention_for_cpu" in name for name in made.names)
    assert made.largest < length**2
