"""Token sequences for calibration and evaluation, straight from Megatron's indexed datasets."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch


def _open(prefix: str) -> Any:
    from nemo_minitron.data.indexed import indexed_datasets

    with warnings.catch_warnings():  # megatron-core 0.19 says that it does not know its rank yet
        warnings.simplefilter("ignore")
        return indexed_datasets().IndexedDataset(prefix)


def token_stream(prefix: str) -> "np.ndarray":
    """All tokens of a dataset, documents one after another with their end-of-document tokens [tokens]."""
    import numpy

    dataset = _open(prefix)
    reader = numpy.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r")
    return reader[: int(dataset.index.sequence_lengths.sum(dtype=numpy.int64))]


def random_sequences(prefixes: Sequence[str], count: int, length: int, seed: int) -> "tuple[torch.Tensor, list[int]]":
    """`count` random windows of `length` tokens (plus one for the last label) of full length.

    Windows start anywhere in the concatenated datasets' tokens; where there are fewer different starts than asked
    for, all of them are taken.

    Returns:
        tokens [n, length + 1] (int64), and each window's start.

    Raises:
        DataError: there are fewer tokens than one window.
    """
    return random_windows([token_stream(prefix) for prefix in prefixes], ", ".join(prefixes), count, length, seed)


def random_windows(
    streams: "Sequence[np.ndarray]", name: str, count: int, length: int, seed: int
) -> "tuple[torch.Tensor, list[int]]":
    """`random_sequences` of token streams.

    Args:
        name: of the streams, for messages.
    """
    import numpy
    import torch

    starts = [max(0, len(stream) - length) for stream in streams]
    total = sum(starts)
    if total < 1:
        raise DataError(f"{name}: fewer tokens than one sequence of {length} + 1; give a shorter length")
    generator = numpy.random.Generator(numpy.random.PCG64(seed))
    chosen = generator.choice(total, size=min(count, total), replace=False, shuffle=True)
    bounds = numpy.cumsum([0, *starts])
    windows = []
    for start in chosen:
        which = int(numpy.searchsorted(bounds, start, side="right")) - 1
        offset = int(start - bounds[which])
        windows.append(numpy.asarray(streams[which][offset : offset + length + 1], dtype=numpy.int64))
    return torch.from_numpy(numpy.stack(windows)), [int(start) for start in chosen]


def consecutive_sequences(prefixes: Sequence[str], length: int, limit: int | None = None) -> "torch.Tensor":
    """Windows of `length` tokens side by side, so that each token is predicted once: tokens [n, length + 1] (int64).

    A window's last label is the next one's first token. The rest that fills no window is left out.
    """
    import numpy
    import torch

    windows: list[numpy.ndarray] = []
    for prefix in prefixes:
        stream = token_stream(prefix)
        for start in range(0, len(stream) - length, length):
            if limit is not None and len(windows) >= limit:
                break
            windows.append(numpy.asarray(stream[start : start + length + 1], dtype=numpy.int64))
    if not windows:
        raise DataError(f"{', '.join(prefixes)}: fewer tokens than one sequence of {length} + 1; give a shorter length")
    return torch.from_numpy(numpy.stack(windows))
