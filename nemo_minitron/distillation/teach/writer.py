"""Runs a teacher over a listing and writes its answers, shard by shard.

Legend: s sequence, b micro batch, g hidden (teacher's), v vocabulary, n tokens of a sample, c tokens of a chunk.

A shard is written beside its place and renamed there, so what is there is whole. It holds the answers to a fixed part
of the listing, whatever the layout; data-parallel replicas take shards in turn.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.storage import safetensors
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.distillation.losses.targets import Sparse, drawn, joined, largest
from nemo_minitron.distillation.teach.forms import ENDS, ENTRY_ENDS, ERROR, KEYS, LOSS, Entries, Hidden, form_of
from nemo_minitron.distillation.teach.header import OUTPUT, SHARDS, Header, shard_path
from nemo_minitron.distillation.teach.listing import Listing
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.lock import FULL
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.chunks import CHUNK, output_weight
from nemo_minitron.megatron.forward import run_forward

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor


def write_answers(
    folder: Path,
    header: Header,
    listing: Listing,
    model: "GPTModel",
    *,
    batch: int,
    padding: int,
    seed: int,
    what: str,
    every: int,
) -> int:
    """Writes what is not there yet of a folder of answers; every rank calls it, on Megatron's parallel state.

    Returns:
        how many tokens that were, on all ranks together.

    Args:
        model: the teacher, on this rank.
        batch: samples a forward pass.
        padding: the token that fills samples up.
        seed: of what is drawn, beside the sample itself.
        what, every: for `Progress`.

    Raises:
        MinitronError: the disk is full; whole shards stay.
    """
    import torch
    from megatron.core import parallel_state

    shards = _ranges(header)
    if rank() == 0:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        for unfinished in (folder / SHARDS).glob(".*"):
            unfinished.unlink()
        header.write(folder)
    torch.distributed.barrier()
    missing = [number for number in range(len(shards)) if not shard_path(folder, number).exists()]
    torch.distributed.barrier()
    _write_output(folder, header, model)
    mine = missing[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    writes = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    with Progress(what, sum(len(shards[number]) for number in mine), unit="sample", every=every) as progress:
        for number in mine:
            answers = _Answers(form_of(header), listing, shards[number], model, batch, seed, writes)
            sequences = torch.stack([_padded(listing, piece, header.seq_length, padding) for piece in shards[number]])
            run_forward(model, sequences, batch, answers.take, progress, answers.states.append)
            if writes:
                _write(folder, shard_path(folder, number), answers.tensors())
    torch.distributed.barrier()
    return sum(header.tokens[number] for number in missing)


def _ranges(header: Header) -> list[range]:
    """The pieces of each shard."""
    ends = [sum(header.samples[: number + 1]) for number in range(len(header.samples))]
    return [range(end - count, end) for end, count in zip(ends, header.samples)]


def _padded(listing: Listing, number: int, length: int, padding: int) -> "Tensor":
    """A piece as tokens [s + 1], padded as in training; the last one is only a label."""
    import torch

    ids = torch.as_tensor(listing.piece(number).ids)
    return torch.nn.functional.pad(ids, (0, length + 1 - len(ids)), value=padding)


class _Answers:
    """The answers to the samples of one shard, as they come.

    Attributes:
        states: the last hidden states [s, b, g] of the batch that is being taken.
    """

    def __init__(
        self,
        form: "Hidden | Entries",
        listing: Listing,
        pieces: range,
        model: "GPTModel",
        batch: int,
        seed: int,
        writes: bool,
    ):
        self.form, self.listing, self.pieces, self.model = form, listing, pieces, model
        self.batch, self.seed, self.writes = batch, seed, writes
        self.states: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {name: [] for name in (*form.columns, LOSS)}
        self.entries: list[int] = []
        self.error = [0.0, 0.0]

    def take(self, losses: "Tensor", index: int) -> None:
        """Keeps the answers to a batch.

        Args:
            losses: of each token [b, s].
        """
        hidden = self.states.pop().transpose(0, 1)  # [b, s, g]
        for row in range(len(losses)):
            number = self.pieces[index * self.batch + row]
            tokens = int(self.listing.tokens[number])
            tensors = self._answer(hidden[row, :tokens], number)
            if not self.writes:
                continue
            tensors[LOSS] = losses[row, :tokens].half()
            for name, tensor in tensors.items():
                self.parts[name].append(tensor.cpu())
            self.entries.append(self.form.entries(tensors))

    def _answer(self, hidden: "Tensor", number: int) -> "dict[str, Tensor]":
        """What is kept of hidden states [n, g]; ranks that share the vocabulary all call it."""
        if not isinstance(self.form, Hidden):
            return self.form.encode(self._entries(hidden, number))
        if not self.writes:
            return {}
        tensors = self.form.encode(hidden)
        kept, exact = self.form.decode(tensors)["hidden"].double(), hidden.double()
        self.error[0] += float((kept - exact).square().sum())
        self.error[1] += float(exact.square().sum())
        return tensors

    def _entries(self, hidden: "Tensor", number: int) -> "Sparse":
        """Entries of the distributions of hidden states [n, g]."""
        import torch
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        header, weight = self.form.header, output_weight(self.model)
        key = int.from_bytes(self.listing.keys[number].tobytes()[:8], "little")
        generator = torch.Generator().manual_seed((key ^ self.seed) & ((1 << 63) - 1))
        chunks = []
        for part in hidden.split(max(1, CHUNK // (4 * header.vocab_size))):
            logits = gather_from_tensor_model_parallel_region(part @ weight.t())  # [c, v]
            if header.keep == "sampled":
                chunks.append(drawn(logits, header.draws, generator))
            else:
                chunks.append(largest(logits, min(header.top_k, header.vocab_size)))
        return joined(chunks)

    def tensors(self) -> "dict[str, Tensor]":
        """The shard."""
        import torch

        tensors = {name: torch.cat(parts) for name, parts in self.parts.items()}
        keys = torch.from_numpy(self.listing.keys[self.pieces.start : self.pieces.stop].copy())
        ends = torch.from_numpy(self.listing.tokens[self.pieces.start : self.pieces.stop].cumsum())
        entries = torch.tensor(self.entries, dtype=torch.int64).cumsum(0)
        if isinstance(self.form, Hidden):
            tensors[ERROR] = torch.tensor(self.error, dtype=torch.float64)
        return {KEYS: keys, ENDS: ends, ENTRY_ENDS: entries, **tensors}


def _write_output(folder: Path, header: Header, model: "GPTModel") -> None:
    """Writes the output matrix [v, g], where hidden states are kept and it is not there yet."""
    import torch
    from megatron.core import parallel_state

    if header.keep != "hidden" or (folder / OUTPUT).exists() or not parallel_state.is_pipeline_last_stage():
        return
    if parallel_state.get_data_parallel_rank():
        return
    part = output_weight(model).detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        _write(folder, folder / OUTPUT, {"weight": torch.cat(parts).cpu()})


def _write(folder: Path, path: Path, tensors: "dict[str, Tensor]") -> None:
    """Writes a file beside `path` and renames it there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _room(folder):
        try:
            with beside.open("wb") as file:
                safetensors.write(file, {name: in_memory(tensor) for name, tensor in tensors.items()})
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Says of a full disk what is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise MinitronError(
            f"no space left on the disk of {folder}: the {len(list((folder / SHARDS).glob('[!.]*')))} whole shards in "
            "it stay, and the same command goes on from there; free some, or keep less (teach.tokens, "
            "teach.precision=fp8, teach.keep=sampled)"
        ) from error


def measured(folder: Path, header: Header, listing: Listing) -> dict[str, Any]:
    """What a whole folder holds: bytes, tokens, the teacher's mean loss by split over learnt tokens, in nats, and the
    relative error of what is kept of hidden states (root of the sum of squares)."""
    import numpy

    from nemo_minitron.checkpoints.file_bytes import whole

    sums: dict[str, list[float]] = {}
    error = numpy.zeros(2)
    for number, pieces in enumerate(_ranges(header)):
        tensors = safetensors.read(whole(shard_path(folder, number)))
        losses, start = tensors[LOSS].read().double().numpy(), 0
        error += tensors[ERROR].read().numpy() if ERROR in tensors else 0.0
        for piece in pieces:
            learnt = numpy.asarray(listing.piece(piece).learnt)[1:].astype(bool)
            stop = start + len(learnt)
            split = sums.setdefault(listing.places[piece].split, [0.0, 0.0])
            split[0] += float(losses[start:stop][learnt].sum())
            split[1] += float(learnt.sum())
            start = stop
    tokens = sum(header.tokens)
    size = sum(path.stat().st_size for path in (folder / SHARDS).iterdir())
    return {
        "samples": sum(header.samples),
        "tokens": tokens,
        "bytes": size + ((folder / OUTPUT).stat().st_size if header.keep == "hidden" else 0),
        "bytes_per_token": size / max(tokens, 1),
        **{f"{split}_loss": total / max(count, 1.0) for split, (total, count) in sums.items()},
        **({"relative_error": float(numpy.sqrt(error[0] / max(error[1], 1e-300)))} if header.keep == "hidden" else {}),
    }
