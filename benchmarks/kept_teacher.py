"""A teacher's answers as they may be kept: loss and gradient beside those of the live teacher, and bytes a token.

    python benchmarks/kept_teacher.py --model DIR --text FILE [--tokens 2048] [--length 512] [--seeds 4] [--threads 1]
                                      [--json FILE] [--quick]

The teacher is a Hugging Face checkpoint; its student here is the teacher without its last layer. The loss is the mean
forward KL over the first tokens of the text, in windows, and the gradients are those of the student's last hidden
states and output matrix, all in fp32: only what is kept is rounded. Kept are

    hidden, bf16     the last hidden states: 2 h bytes a token
    hidden, fp8      the same in e4m3 with a float32 scale a token: h + 4 bytes
    drawn, n         n independent draws: of each distinct entry 2 bytes (3 above 65,536 entries) and its count less 1
                     in 1 byte (2 above 256 draws), and the entropy in float32. Counts add up to n: no length is needed.
    stratified, n    n draws, one in each n-th of the distribution; else as drawn
    largest, k       k entries of 2 (3) bytes with a float16 probability each, and the rest and the entropy in float32

The output matrix, which hidden states want once, is not in the bytes. Errors are relative: |g - exact| / |exact|. Of
drawn entries the rows show means over seeds, the loss's bias with its standard error, and what error the mean of all
seeds' gradients has: of unbiased draws it falls with their number.
"""

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

DRAWS, LARGEST = (16, 64, 256), (16, 64)
E4M3_MAX = 448.0


class Outputs(NamedTuple):
    """Last hidden states [t, h] of both after the final norm, and the output matrix that they share [v, h], in fp32."""

    teacher: Any
    student: Any
    weight: Any


class Measured(NamedTuple):
    """The loss of each token [t], and the gradients of hidden states [t, h] and output matrix [v, h]."""

    loss: Any
    gradients: tuple[Any, Any]


def outputs(model: str, text: Path, tokens: int, length: int) -> Outputs:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0, :tokens]
    if len(ids) < tokens:
        raise SystemExit(f"{text} has {len(ids)} tokens; --tokens {tokens} are wanted")
    windows = ids.view(-1, length)

    def states() -> Any:
        with torch.no_grad():
            return torch.cat([teacher.model(window[None], use_cache=False).last_hidden_state[0] for window in windows])

    of_teacher = states()
    teacher.model.layers = teacher.model.layers[:-1]
    return Outputs(of_teacher, states(), teacher.lm_head.weight.detach())


def measure(given: Outputs, **teacher: Any) -> Measured:
    """Of `teachers` or `sparse`, as `fused_divergence` takes them."""
    import torch

    from nemo_minitron.distillation.losses.fused import fused_divergence

    hidden, weight = (tensor.clone().requires_grad_() for tensor in (given.student, given.weight))
    shares = torch.full((len(hidden),), 1 / len(hidden))
    loss = fused_divergence(hidden, weight, **teacher, kd_weights=shares)
    return Measured(loss.kd, torch.autograd.grad(loss.total, (hidden, weight)))


def as_fp8(hidden: Any) -> Any:
    """Rounded to e4m3 with a scale a token."""
    import torch

    scale = hidden.abs().amax(dim=-1, keepdim=True) / E4M3_MAX
    return (hidden / scale).to(torch.float8_e4m3fn).float() * scale


def sparse(given: Outputs, kept: Callable[[Any], Any]) -> Any:
    """The Sparse that `kept` makes of the teacher's logits, 256 tokens at a time."""
    from nemo_minitron.distillation.losses.targets import joined

    return joined([kept(part @ given.weight.t()) for part in given.teacher.split(256)])


def cases(given: Outputs, seeds: int) -> Iterator[tuple[str, float, Iterator[Measured]]]:
    """Name, bytes a token, and what each seed gives."""
    import torch

    from nemo_minitron.distillation.losses.targets import Dense, drawn, largest

    vocabulary, width = given.weight.shape
    entry = 2 if vocabulary <= 1 << 16 else 3
    for name, size, hidden in (
        ("hidden, bf16", 2 * width, given.teacher.bfloat16().float()),
        ("hidden, fp8", width + 4, as_fp8(given.teacher)),
    ):
        yield name, size, iter([measure(given, teachers=[Dense(hidden, given.weight)])])
    for draws, how in itertools.product(DRAWS, ("drawn", "stratified")):
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        draw = partial(drawn, draws=draws, stratified=how == "stratified")
        made = [sparse(given, partial(draw, generator=one)) for one in generators]
        distinct = sum(float((one.probabilities > 0).sum()) for one in made) / len(given.teacher) / seeds
        size = distinct * (entry + (1 if draws <= 256 else 2)) + 4
        yield f"{how}, {draws}", size, (measure(given, sparse=[one]) for one in made)
    for k in LARGEST:
        kept = sparse(given, partial(largest, k=k))
        kept = kept._replace(probabilities=kept.probabilities.half().float())
        yield f"largest, {k}", k * (entry + 2) + 8, iter([measure(given, sparse=[kept])])


def compared(name: str, size: float, found: Iterator[Measured], exact: Measured) -> dict[str, Any]:
    """A row of the table."""
    import torch

    count, means, biases, singles = 0, [torch.zeros_like(one) for one in exact.gradients], [], []
    for one in found:
        count += 1
        biases.append(float((one.loss - exact.loss).mean(dtype=torch.float64)))
        singles.append([against(own, other) for own, other in zip(one.gradients, exact.gradients)])
        for mean, gradient in zip(means, one.gradients):
            mean += gradient
    row: dict[str, Any] = {"kept": name, "bytes": size, "seeds": count, "bias": sum(biases) / count}
    if count > 1:
        row["bias_error"] = float(torch.tensor(biases).std() / count**0.5)
    for i, what in enumerate(("hidden", "matrix")):
        for j, quantity in enumerate(("error", "cosine")):
            row[f"{what}_{quantity}"] = sum(single[i][j] for single in singles) / count
        row[f"{what}_error_of_mean"] = against(means[i] / count, exact.gradients[i])[0]
    return row


def against(own: Any, exact: Any) -> tuple[float, float]:
    """Relative error and cosine."""
    own, exact = own.double().flatten(), exact.double().flatten()
    error, sizes = (own - exact).norm() / exact.norm(), own.norm() * exact.norm()
    return float(error), float(own @ exact / sizes)


HEADER = (
    f"{'':<16}{'bytes':>8}{'bias of the loss':>24}   {'hidden states: error':>20}{'cosine':>9}{'of mean':>9}"
    f"{'matrix: error':>15}{'cosine':>9}{'of mean':>9}"
)


def line(row: dict[str, Any]) -> str:
    bias = f"{row['bias']:+.6f}" + (f" ± {row['bias_error']:.6f}" if "bias_error" in row else "")
    parts = [f"{row['kept']:<16}{row['bytes']:>8.1f}{bias:>24}   "]
    for what, width in (("hidden", 20), ("matrix", 15)):
        of_mean = f"{row[f'{what}_error_of_mean']:.4f}" if row["seeds"] > 1 else ""
        parts.append(f"{row[f'{what}_error']:>{width}.4f}{row[f'{what}_cosine']:>9.4f}{of_mean:>9}")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the teacher, a Hugging Face checkpoint")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="plain text")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--seeds", type=int, default=4, help="of drawn entries")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--quick", action="store_true", help="256 tokens, two seeds")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.length, options.seeds = 256, 128, 2
    if options.tokens % options.length:
        parser.error(f"--tokens {options.tokens} must be a multiple of --length {options.length}")

    import torch

    from nemo_minitron.distillation.losses.targets import Dense

    torch.set_num_threads(options.threads)
    given = outputs(options.model, options.text, options.tokens, options.length)
    exact = measure(given, teachers=[Dense(given.teacher, given.weight)])
    loss = float(exact.loss.mean())
    print(f"{options.tokens} tokens, forward KL of the student without the last layer: {loss:.6f} nats\n{HEADER}")
    rows = []
    for name, size, found in cases(given, options.seeds):
        rows.append(compared(name, size, found, exact))
        print(line(rows[-1]), flush=True)
    if options.json:
        machine = {"cpus": os.cpu_count(), "threads": options.threads, "platform": platform.platform()}
        sizes = {name: getattr(options, name) for name in ("tokens", "length", "seeds")}
        content = {"loss": loss, "rows": rows, "sizes": sizes, "machine": machine}
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
