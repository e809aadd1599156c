"""Pieces of tensors, put together as torch would."""

from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.chunked import Chunk, Chunked
from nemo_minitron.checkpoints.file_bytes import Bytes, whole
from nemo_minitron.checkpoints.precision import FLOATS, count_not_finite
from nemo_minitron.checkpoints.tensors import BLOCK, Cast, Resized, Runs, in_memory
from nemo_minitron.errors import CheckpointError


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def cut(tensor: torch.Tensor, rows: int, columns: int, folder: Path) -> Chunked:
    """A stacked tensor [l, r, c] in boxes of so many rows and columns, one file each: tensor parallel, both ways."""
    chunks = []
    for layer in range(tensor.shape[0]):
        for top in range(0, tensor.shape[1], rows):
            for left in range(0, tensor.shape[2], columns):
                box = tensor[layer : layer + 1, top : top + rows, left : left + columns]
                path = folder / f"{layer}.{top}.{left}"
                path.write_bytes(raw(box))
                chunks.append(Chunk((layer, top, left), tuple(box.shape), lambda path=path: (whole(path), None)))
    return Chunked(tuple(tensor.shape), "float32", tuple(reversed(chunks)), "t")


@pytest.mark.parametrize(("rows", "columns"), [(12, 10), (4, 10), (12, 5), (5, 10), (12, 3), (4, 5)])
def test_boxes_of_any_cut_make_up_the_tensor(rows, columns, tmp_path):
    tensor = torch.randn(3, 12, 10, generator=torch.Generator().manual_seed(0))
    stacked = cut(tensor, rows, columns, tmp_path)
    for layer in range(3):
        assert torch.equal(stacked.layer(layer).read(), tensor[layer])


def test_layers_inside_one_piece_are_cut_out_of_it(tmp_path):
    tensor = torch.randn(3, 4, 5)
    (tmp_path / "all").write_bytes(raw(tensor))
    chunk = Chunk((0, 0, 0), (3, 4, 5), lambda: (whole(tmp_path / "all"), None))
    stacked = Chunked((3, 4, 5), "float32", (chunk,), "t")
    assert torch.equal(stacked.layer(2).read(), tensor[2])


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4))],  # a gap
        [((0, 0), (4, 4)), ((0, 0), (4, 4))],  # twice
        [((0, 0), (3, 4)), ((2, 0), (2, 4))],  # an overlap
        [((0, 0), (4, 2)), ((0, 2), (3, 2)), ((3, 3), (1, 1))],
        [((0, 0), (5, 4))],  # beyond
        [((0, 0), (4, 4, 1))],
        [((-1, 0), (5, 4))],
        [],
    ],
)
def test_boxes_that_do_not_tile_a_tensor_are_refused(boxes):
    chunks = tuple(Chunk(start, shape, lambda: (None, None)) for start, shape in boxes)
    with pytest.raises(CheckpointError, match="do not make up a tensor"):
        Chunked((4, 4), "float32", chunks, "t").checked()


def test_rows_of_runs_are_rows_of_the_tensor(tmp_path):
    tensor = torch.randn(9, 4)
    (tmp_path / "a").write_bytes(b"before" + raw(tensor[:5]))
    (tmp_path / "b").write_bytes(raw(tensor[5:]))
    runs = Runs((9, 4), "float32", (Bytes(tmp_path / "a", 6, 80), whole(tmp_path / "b")))
    for first, last in ((0, 9), (0, 5), (3, 7), (5, 6), (4, 4)):
        assert torch.equal(runs.rows(first, last).read(), tensor[first:last])


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_resized_tensors_lose_rows_or_gain_zeros(rows):
    tensor = torch.randn(5, 4)
    expected = torch.zeros(rows, 4)
    expected[: min(rows, 5)] = tensor[:rows]
    assert torch.equal(Resized(in_memory(tensor), rows).read(), expected)


def test_a_cast_is_torchs_own_over_many_blocks():
    tensor = torch.randn(3, BLOCK // 4 + 1)
    assert torch.equal(Cast(in_memory(tensor), "bfloat16").read(), tensor.bfloat16())


def test_bytes_never_reach_outside():
    with pytest.raises(CheckpointError, match="reach outside"):
        Bytes(Path("x"), 0, 10).part(5, 6)
    with pytest.raises(CheckpointError, match="reach outside"):
        Bytes(Path("x"), 0, 10).part(-1, 2)


NUMBERS = {
    "bfloat16": torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.bfloat16),
    "float16": torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.float16),
    # Every upper half of a float32 above lower halves around the tie of rounding to bfloat16, and to float16.
    "float32": torch.stack(
        [(torch.arange(1 << 16) << 16 | low).to(torch.uint32) for low in (0, 1, 0x1000, 0x3000, 0x7FFF, 0x8000, 0x8001)]
    ).view(torch.float32),
    "float64": torch.randn(1 << 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    * 10.0 ** torch.linspace(-50, 50, 1 << 12, dtype=torch.float64),
    "float8_e4m3fn": torch.arange(1 << 8).to(torch.uint8).view(torch.float8_e4m3fn),
    "int8": torch.arange(-128, 128).to(torch.int8),
    "int64": torch.arange(-(1 << 30), 1 << 30, 999_983),
}


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", NUMBERS)
def test_every_cast_is_torchs_own(source, target):
    values = NUMBERS[source].flatten()
    found = Cast(in_memory(values), target).read()
    expected = values.to(getattr(torch, target))
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    same = {2: torch.int16, 4: torch.int32}[found.element_size()]
    assert torch.equal(found[number].view(same), expected[number].view(same))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_counted_as_torch_does(dtype):
    values = NUMBERS[dtype].flatten()
    assert count_not_finite(memoryview(raw(values)), dtype) == int((~values.isfinite()).sum())
