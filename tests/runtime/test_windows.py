"""Sliding windows in Megatron's local attention, whether the installed Megatron Core knows them or not."""

import pytest
import torch
import transformers

import models
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.layout import Layout
from nemo_minitron.runtime.windows import outside

CPU = Layout(cuda=False, bf16=False)


@pytest.mark.parametrize("by", ["megatron's way", "ours"])
def test_a_windowed_model_computes_what_transformers_does(tmp_path, monkeypatch, by):
    from nemo_minitron.runtime.engine import engine
    from nemo_minitron.runtime.ranks import load_model, parallel_ranks

    if by == "ours":
        monkeypatch.setattr(versions, "local_attention_takes_windows", lambda: False)
    folder = models.save("mistral-window", torch.float32, tmp_path / "hf")
    checkpoint = open_checkpoint(folder)
    tokens = torch.randint(0, 259, (2, 40), generator=torch.Generator().manual_seed(1))  # [b, s], five windows
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(tokens).logits
        with engine(1, tmp_path / "log"), parallel_ranks(CPU, 1):
            model = load_model(checkpoint.architecture, CPU, checkpoint, local_spec=True).eval()
            got = model(tokens, torch.arange(40).expand(2, 40), None)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_window_hides_what_comes_after_and_what_lies_too_far_before():
    expected = [[column > row or row - column > 2 for column in range(5)] for row in range(5)]
    assert outside(5, 5, 2, torch.device("cpu")).tolist() == expected
    assert outside(1, 5, 2, torch.device("cpu")).tolist() == expected[-1:]
