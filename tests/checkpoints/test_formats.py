"""Every family through every format: bits, logits, and what Megatron and transformers themselves write and read."""

import json
from pathlib import Path

import pytest
import torch

from models import FAMILIES, build, equal, save, stored
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.convert import convert
from nemo_minitron.config import ConvertConfig, validated

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(source: Path, output: Path, **settings) -> Path:
    convert(validated(ConvertConfig(source=str(source), output=str(output), **{"verify": "tensors", **settings})))
    return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_through_all_formats_keeps_every_bit(family, dtype, tmp_path):
    start = save(family, DTYPES[dtype], tmp_path / "start", shard="100KB")
    nemo2 = run(start, tmp_path / "nemo2")
    archive = run(nemo2, tmp_path / "archive.nemo", weights="zarr" if dtype == "fp32" else "torch_dist")
    again = run(archive, tmp_path / "nemo2-again")
    end = run(again, tmp_path / "end", to="hf")
    assert equal(stored(start), stored(end))
    architectures = [open_checkpoint(path).architecture for path in (start, nemo2, archive, again, end)]
    assert all(architecture == architectures[0] for architecture in architectures)
    assert architectures[0].parameters() == build(family, torch.float32).num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_megatron_compute_the_same(family, tmp_path):
    """Source by transformers, NeMo-2 by Megatron's own strict loader, export by transformers: fp32, 1e-4 relative."""
    from nemo_minitron.checkpoints.verify import logits

    start = save(family, torch.float32, tmp_path / "start")
    nemo2 = run(start, tmp_path / "nemo2")
    archive = run(nemo2, tmp_path / "archive.nemo")
    end = run(archive, tmp_path / "end", to="hf")
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = build(family, torch.float32)(tokens).logits
    for path in (nemo2, archive, end):
        found = logits(open_checkpoint(path), tokens)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), path
    assert json.loads((end / "config.json").read_text())["architectures"] == [
        type(build(family, torch.float32)).__name__
    ]
