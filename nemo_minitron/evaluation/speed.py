"""`minitron benchmark`: size, speed and memory of checkpoints, side by side.

Every checkpoint lives in a process of its own, so that its peak memory is its own. The processes take turns: in each
round every checkpoint runs once, one at a time, in an order that moves on by one each round, so that a machine that
slows down slows all of them down. Ratios are medians, over rounds, of a checkpoint's figure to the first one's in the
same round.
"""

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import human
from nemo_minitron.artifacts import Manifest, write_json
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import BenchmarkConfig
from nemo_minitron.errors import ConfigError, EngineError
from nemo_minitron.evaluation.loading import display_names, open_all
from nemo_minitron.jobs.job import Job
from nemo_minitron.report.table import aligned

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from torch import Tensor
    from transformers import DynamicCache

RESULTS, TABLE = "results.json", "table.txt"
PROMPT_TOKENS, NEW_TOKENS = 1024, 128
#: What a round measures, and the unit of it.
MEASURED = {"prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0, "first_token_seconds": 1.0}


def benchmark(config: BenchmarkConfig) -> Manifest | None:
    """Measures every checkpoint and prints the table, or JSON.

    Raises:
        CheckpointError, ConfigError, EngineError: before any weight is read.
        OutputExistsError: the output was made from something else.
    """
    checkpoints = open_all(config.models, config, tokenizers=False)
    config = with_lengths(config, checkpoints)
    if config.output is None:
        results, manifest = measure(config, checkpoints), None
    else:
        manifest = _job(config, config.output).run(lambda partial: write_results(partial, config, checkpoints))
        results = json.loads((Path(config.output) / RESULTS).read_text(encoding="utf-8"))
    print(json.dumps(results, indent=2) if config.json else render(results))
    return None if config.json else manifest


def with_lengths(config: BenchmarkConfig, checkpoints: Sequence[Checkpoint]) -> BenchmarkConfig:
    """The configuration with the numbers of tokens; raises ConfigError where a model is too short for them."""
    longest = min(checkpoint.architecture.seq_length for checkpoint in checkpoints)
    prompt = config.prompt_tokens or min(PROMPT_TOKENS, longest * 3 // 4)
    new = config.new_tokens or min(NEW_TOKENS, longest - prompt)
    if prompt + new > longest or new < 2:
        raise ConfigError(
            f"prompt_tokens {prompt} + new_tokens {new} = {prompt + new} must be at most {longest}, the length of the "
            "shortest model, and new_tokens at least 2",
            "minitron benchmark",
        )
    return dataclasses.replace(config, prompt_tokens=prompt, new_tokens=new)


def _job(config: BenchmarkConfig, output: str) -> Job:
    inputs: dict[str, str | PathLike[str]] = {f"model{number}": path for number, path in enumerate(config.models, 1)}
    settings = dataclasses.asdict(config) | {"names": display_names(config.models, config.names)}
    return Job(
        stage="benchmark",
        output=Path(output),
        config=settings,
        inputs=inputs,
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("output", "overwrite", "json", "models"),
        sampled=tuple(inputs),
    )


def write_results(partial: Path, config: BenchmarkConfig, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """The job's work: measures, and writes results and table."""
    results = measure(config, checkpoints)
    write_json(partial / RESULTS, results)
    (partial / TABLE).write_text(render(results) + "\n", encoding="utf-8")
    return {"metrics": results}


def measure(config: BenchmarkConfig, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Runs all rounds; the figures of every checkpoint, and their ratios to the first's."""
    names = display_names(config.models, config.names)
    with _workers(config) as workers:
        for worker in workers:
            worker.ask("round")  # loads the model, and is not counted
        for _ in range(config.warmup_rounds):
            for worker in workers:
                worker.ask("round")
        rounds: list[list[dict[str, float]]] = [[] for _ in workers]
        for number in range(config.rounds):
            for turn in range(len(workers)):
                chosen = (number + turn) % len(workers)
                rounds[chosen].append(workers[chosen].ask("round"))
        described = [worker.ask("memory") for worker in workers]
    models = [
        {
            "name": name,
            "path": path,
            "format": checkpoint.kind.title,
            "parameters": checkpoint.architecture.parameters(),
            "bytes_on_disk": checkpoint.size,
            **{metric: _spread([one[metric] for one in taken]) for metric in MEASURED},
            **about,
        }
        for name, path, checkpoint, taken, about in zip(names, config.models, checkpoints, rounds, described)
    ]
    first = models[0]
    for model, taken in zip(models, rounds):
        model["ratios"] = {
            key: model[key] / first[key] for key in ("parameters", "bytes_on_disk", "peak_memory_bytes")
        } | {
            metric: statistics.median(one[metric] / base[metric] for one, base in zip(taken, rounds[0]))
            for metric in MEASURED
        }
    lengths = {name: getattr(config, name) for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds")}
    return {"models": models, "reference": names[0], **lengths}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


@dataclasses.dataclass
class _Worker:
    """A process that holds one checkpoint."""

    process: "BaseProcess"
    connection: "Connection[Any, Any]"
    path: str

    def ask(self, what: str) -> dict[str, Any]:
        """The answer; raises what the process met."""
        try:
            self.connection.send(what)
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise EngineError(
                f"the process that ran {self.path} ended with exit code {self.process.exitcode}; if it was killed, "
                "there was too little memory for all checkpoints at once: benchmark fewer"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextlib.contextmanager
def _workers(config: BenchmarkConfig) -> Iterator[list[_Worker]]:
    """A process a checkpoint; none is left behind."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for path in config.models:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, path, config), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours, path))
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _serve(connection: "Connection[Any, Any]", path: str, config: BenchmarkConfig) -> None:
    """A worker's life: answers until nobody asks any more."""
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        runner = None
        while True:
            what = connection.recv()
            try:
                runner = runner or Runner(path, config)
                connection.send(runner.round() if what == "round" else runner.memory())
            except Exception as error:
                connection.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """An error as it can go to another process."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(f"{type(error).__name__}: {error}")
    return error


class Runner:
    """One checkpoint: a prefill and a greedy decode with a key-value cache, timed."""

    def __init__(self, path: str, config: BenchmarkConfig):
        import torch

        from nemo_minitron.checkpoints.checkpoint import open_checkpoint
        from nemo_minitron.evaluation.loading import load_model_alone, resolve_device
        from nemo_minitron.jobs.memory import reset_peak_memory

        assert config.prompt_tokens is not None and config.new_tokens is not None, "with_lengths states them"
        self.new_tokens, self.batch = config.new_tokens, config.batch_size
        device = resolve_device(config.device)
        self.cuda = device != "cpu"
        checkpoint = open_checkpoint(path, quantized=True)
        _rehearse(checkpoint.architecture.family, device)
        self.before = 0 if self.cuda else _resident_bytes()
        self.model = load_model_alone(checkpoint, config)
        reset_peak_memory()
        vocabulary = checkpoint.architecture.vocab_size - checkpoint.architecture.vocab_padding
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.batch_size, config.prompt_tokens)
        self.prompt = torch.randint(0, vocabulary, shape, generator=generator).to(self.model.device)  # [b, s]

    def round(self) -> dict[str, float]:
        """Prefill and decode once. The first token comes out of the prefill; decode makes the others."""
        import torch
        from transformers import DynamicCache

        with torch.inference_mode():
            cache = DynamicCache()
            started = self._now()
            token = self._step(self.prompt, cache)
            first = self._now() - started
            started = self._now()
            for _ in range(self.new_tokens - 1):
                token = self._step(token, cache)
            rest = self._now() - started
        return {
            "prefill_tokens_per_second": self.prompt.numel() / first,
            "decode_tokens_per_second": self.batch * (self.new_tokens - 1) / rest,
            "first_token_seconds": first,
        }

    def memory(self) -> dict[str, Any]:
        """Peak memory since the model was loaded: on a GPU allocated there; on a CPU resident, beyond what the process
        had before."""
        from nemo_minitron.jobs.memory import peak_memory_bytes

        return {
            "peak_memory_bytes": peak_memory_bytes() - self.before,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _step(self, tokens: "Tensor", cache: "DynamicCache") -> "Tensor":
        """The likeliest next token [b, 1]."""
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return token

    def _now(self) -> float:
        import time

        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def _rehearse(family: str, device: str) -> None:
    """Loads and runs a model of a few hundred numbers, so that what libraries import and set up on the way does not
    count as the memory of the one that is measured."""
    import torch
    from transformers import DynamicCache

    from nemo_minitron.checkpoints.transformers_model import model_class

    kind = model_class(family)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    config = kind.config_class(**sizes)
    model = kind.from_pretrained(None, config=config, state_dict=kind(config).state_dict()).to(device).eval()
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), past_key_values=DynamicCache())


def _resident_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024
    return 0


def render(results: dict[str, Any]) -> str:
    """A line a checkpoint, each figure with its ratio to the first's."""
    head = ("", "parameters", "on disk", "prefill tok/s", "decode tok/s", "first token", "peak memory")
    lines = [head]
    for model in results["models"]:
        ratios = model["ratios"]
        shown = {
            "parameters": human(model["parameters"]),
            "bytes_on_disk": _size(model["bytes_on_disk"]),
            "prefill_tokens_per_second": f"{model['prefill_tokens_per_second']['median']:,.0f}",
            "decode_tokens_per_second": f"{model['decode_tokens_per_second']['median']:,.1f}",
            "first_token_seconds": f"{1000 * model['first_token_seconds']['median']:,.1f} ms",
            "peak_memory_bytes": _size(model["peak_memory_bytes"]),
        }
        lines.append((model["name"], *(f"{text} ({ratios[key]:.2f}x)" for key, text in shown.items())))
    about = results["models"][0]
    return "\n".join(
        [
            aligned(lines),
            f"batch {results['batch_size']}, {results['prompt_tokens']} tokens read, {results['new_tokens']} made, "
            f"{about['dtype']} on {about['device']}; medians of {results['rounds']} rounds in which all take turns",
            f"(ratio to {results['reference']}); peak memory: of each one's own process, beyond what it had before",
        ]
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
