"""A checkpoint in several files is another one as soon as any of them is."""

from pathlib import Path

import pytest
import torch
from test_gguf import model, run, split
from test_hostile import make

from nemo_minitron.artifacts import Manifest, fingerprint, sampled_fingerprint
from nemo_minitron.config import ConvertConfig, validated
from nemo_minitron.conversion.convert import convert
from nemo_minitron.errors import OutputExistsError

#: Drawn anew for each save; what it describes is in the files beside it.
DRAWN = ".metadata"


def changed(file: Path) -> bytes:
    """Turns one bit in the middle of a file; returns what was there."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    return whole


@pytest.mark.parametrize("digest", [fingerprint, sampled_fingerprint])
@pytest.mark.parametrize("kind", ["hf", "nemo1", "zarr", "ckpt", "nemo2", "bridge", "megatron-lm"])
def test_every_file_of_a_folder_counts(kind, digest, tmp_path):
    """Shards of safetensors, zarr's hidden descriptions, torch_dist, the folders of Megatron-Bridge's iterations."""
    folder = make(tmp_path / kind, kind)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DRAWN)
    assert len(files) > 1
    before = digest(folder)
    for file in files:
        if not file.stat().st_size:
            continue
        kept = changed(file)
        assert digest(folder) != before, file
        file.write_bytes(kept)
    assert digest(folder) == before


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("split")
    file = run(model("llama2", torch.bfloat16, folder / "start"), folder / "model.gguf")
    return split(file, folder / "parts", 3)


@pytest.mark.parametrize("digest", [fingerprint, sampled_fingerprint])
def test_every_part_of_a_split_file_counts(parts, digest, tmp_path):
    (parts[0].parent / "other-00002-of-00003.gguf").write_text("of another file")
    before = digest(parts[0])
    assert {digest(part) for part in parts} == {before}
    for part in parts:
        kept = changed(part)
        assert digest(parts[0]) != before
        part.write_bytes(kept)
    assert digest(parts[0]) == before
    parts[2].rename(tmp_path / "away")
    assert digest(parts[0]) != before
    (tmp_path / "away").rename(parts[2])


def test_a_conversion_is_made_again_when_a_later_part_is_another(parts, tmp_path):
    output = tmp_path / "hf"
    settings = ConvertConfig(source=str(parts[0]), output=str(output), to="hf", verify="none")
    convert(validated(settings))
    first = Manifest.read(output)
    assert convert(validated(settings)).key == first.key
    kept = parts[1].read_bytes()
    parts[1].write_bytes(kept[:-64] + bytes(64))
    try:
        with pytest.raises(OutputExistsError, match="it was made from another source"):
            convert(validated(settings))
    finally:
        parts[1].write_bytes(kept)
