"""Losses without whole logits are those of Megatron's own forward pass."""

import pytest
import torch

import models
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.megatron import chunks
from nemo_minitron.megatron.forward import load_model, parallel_ranks, run_forward
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.megatron.session import engine

VOCABULARY, LENGTH = 259, 24


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama2", "llama32-tied", "nemotron"])
def test_losses_in_chunks_are_megatrons_and_transformers(name, bf16, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(models.save(name, torch.float32, tmp_path / "model"))
    layout = Layout(cuda=False, bf16=bf16)
    tokens = torch.randint(0, VOCABULARY, (5, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    by_rows, sizes = {}, []
    with engine(1, tmp_path / "log", cuda=False), parallel_ranks(layout, 1):
        model = load_model(checkpoint.architecture, layout, checkpoint, local_spec=True)
        layer, own = type(model.output_layer), type(model).compute_language_model_loss
        forward = layer.forward

        def watched(self, hidden, *args, **options):
            sizes.extend([len(hidden)] if self is model.output_layer else [])
            return forward(self, hidden, *args, **options)

        monkeypatch.setattr(layer, "forward", watched)
        positions = torch.arange(LENGTH).expand(5, LENGTH)
        with torch.no_grad():
            whole = model(input_ids=tokens[:, :-1], position_ids=positions, attention_mask=None, labels=tokens[:, 1:])
        for rows in (1, 7, 1000):
            monkeypatch.setattr(chunks, "CHUNK", 4 * 5 * VOCABULARY * rows)
            sizes.clear()
            run_forward(model, tokens, 5, lambda losses, index, rows=rows: by_rows.update({rows: losses}))
            assert sizes == [min(rows, LENGTH - first) for first in range(0, LENGTH, rows)]
        sizes.clear()
        run_forward(model, tokens, 2)
        assert not sizes  # nobody takes losses: the output layer does not run
        assert "forward" not in vars(model.output_layer) and model.compute_language_model_loss.__func__ is own
    for rows, losses in by_rows.items():
        assert torch.allclose(losses, whole.float(), rtol=0, atol=1e-5 if not bf16 else 5e-2), rows
    if not bf16:
        with torch.no_grad():
            logits = models.build(name, torch.float64)(tokens[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        assert torch.allclose(by_rows[7].double().flatten(), expected, rtol=0, atol=1e-4)


def test_what_fails_inside_leaves_the_model_as_it_was(tmp_path):
    checkpoint = open_checkpoint(models.save("llama2", torch.float32, tmp_path / "model"))
    layout = Layout(cuda=False, bf16=False)
    with engine(1, tmp_path / "log", cuda=False), parallel_ranks(layout, 1):
        model = load_model(checkpoint.architecture, layout, checkpoint, local_spec=True)
        with pytest.raises(RuntimeError, match="inside"), chunks.output_in_chunks(model):
            assert "forward" in vars(model.output_layer)
            raise RuntimeError("inside")
        assert "forward" not in vars(model.output_layer)
        assert "compute_language_model_loss" not in vars(model)
