"""What a distillation step costs beyond its parts: step / (teacher forward + student step).

    python benchmarks/kd_step.py [--shapes NAME ...] [--steps 12] [--rounds 3] [--threads N] [--json FILE] [--quick]
    python benchmarks/kd_step.py --peer [--teacher DIR (--student DIR | --sizes hidden_size=448 ...)] [--batch 4 256]

For each shape: the teacher's forward pass to its logits, a training step of the student alone (language-model loss:
forward, backward, clipping, Adam) and a distillation step of the same student, all by the package's own training by
NeMo and Megatron, on the same batches, one after another in one process, in rounds. The times are medians over all
steps but each round's first two. One micro batch a step. On CUDA where there is one.

With --peer the whole step stands beside plain PyTorch with transformers' models instead (kd_peer.py), on a CPU: time
and peak memory, and their ratios. A teacher of yours takes the place of the shapes, in any format, with a student of
yours, or one that is cut from it to --sizes (prune.method=minitron).
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_minitron import config as c

#: name: teacher, student's sizes, tokens a sample, samples a step
SHAPES: dict[str, tuple[dict[str, Any], dict[str, int], int, int]] = {
    "width, vocabulary 32k": (
        {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8, "vocab_size": 32000},
        {"hidden_size": 384, "ffn_hidden_size": 1024},
        256,
        4,
    ),
    "depth, vocabulary 32k": (
        {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8, "vocab_size": 32000},
        {"num_layers": 4},
        256,
        4,
    ),
    "width, vocabulary 128k": (
        {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1792, "num_attention_heads": 8, "vocab_size": 128256},
        {"hidden_size": 384, "ffn_hidden_size": 1152},
        256,
        2,
    ),
}
WARM_UP = 2


def stage_fields(data: Path, output: Path, length: int, samples: int, steps: int, **model: Any) -> dict[str, Any]:
    return {
        "trainer": c.TrainerConfig(max_steps=steps, val_check_interval=steps, limit_val_batches=1),
        "model": c.ModelConfig(
            nemo_path=str(output),
            micro_batch_size=samples,
            global_batch_size=samples,
            data=c.ModelDataConfig(data_prefix=str(data), seq_length=length, num_workers=0),
            **model,
        ),
    }


def make_model(data: Path, output: Path, sizes: dict[str, Any], length: int) -> None:
    """A model of these sizes with random weights, after one step of training."""
    from nemo_minitron.training.finetune import finetune

    architecture = {"kv_channels": 64, "seq_length": length, **sizes}
    fields = stage_fields(data, output, length, 1, 1, init="random", architecture=architecture)
    finetune(c.FinetuneConfig(**fields))


def stopwatch() -> Any:
    """A callback that keeps the seconds of each training step, data included."""
    import lightning.pytorch as pl
    import torch

    class Stopwatch(pl.Callback):
        seconds: list[float]

        def on_train_start(self, *arguments: Any) -> None:
            self.seconds = []

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.started = now(torch)

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.seconds.append(now(torch) - self.started)

    return Stopwatch()


def now(torch: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def training_steps(config: c.DistillConfig, folder: Path, forward: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of each step, and with `forward` of as many forward passes of the teacher on the same shape of batch."""
    watch = stopwatch()
    alone, _ = run_training(config, folder, [watch], forward=forward)
    return watch.seconds, alone


def run_training(
    config: c.DistillConfig, folder: Path, watches: list[Any], *, forward: bool = False
) -> tuple[list[float], Any]:
    """Seconds of the teacher's forward passes after the run (with `forward`), and what the run was, loop.Trained."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.distillation.attach import Distillation
    from nemo_minitron.distillation.command import student_module
    from nemo_minitron.distillation.module import teacher_in_validation
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.training.inputs import LOG, build_data, nemo_tokenizer, training_inputs
    from nemo_minitron.training.loop import train_and_validate

    student = open_checkpoint(config.model.restore_from_path)
    teacher = open_checkpoint(config.model.kd_teacher_restore_from_path) if config.kd.kd_weight else None
    inputs = training_inputs(config, student.architecture, student.tokenizer)
    with (
        tempfile.TemporaryDirectory(dir=folder) as partial,
        engine(config.seed, Path(partial) / LOG, cuda=inputs.layout.cuda),
    ):
        tokenizer = nemo_tokenizer(inputs.tokenizer)
        distillation = Distillation(teacher, config.kd) if teacher else None
        module = student_module(config, student, distillation, inputs, tokenizer)
        data = build_data(config, inputs, tokenizer, Path(partial))
        callbacks = [*watches] + ([teacher_in_validation()] if teacher else [])
        trained = train_and_validate(module, data, config, inputs.layout, Path(partial), callbacks)
        alone = teacher_forward(distillation, config, inputs.seq_length) if distillation and forward else []
    return alone, trained


def teacher_forward(distillation: Any, config: c.DistillConfig, length: int) -> list[float]:
    """Seconds of forward passes of the teacher, output layer included, without gradients."""
    import torch

    teacher = distillation.attached.teacher
    distillation.detach()
    device = next(teacher.parameters()).device
    tokens = torch.randint(100, (config.model.micro_batch_size, length), device=device)
    positions = torch.arange(length, device=device).expand_as(tokens)
    found = []
    for _ in range(config.trainer.max_steps):
        with torch.no_grad():
            started = now(torch)
            teacher(tokens, positions, None)
            found.append(now(torch) - started)
    return found


def measure(name: str, steps: int, rounds: int, data: Path, folder: Path) -> dict[str, Any]:
    """Medians of the three for one shape."""
    teacher, changed, length, samples = SHAPES[name]
    place = folder / name.replace(" ", "-").replace(",", "")
    paths = {"teacher": place / "teacher", "student": place / "student"}
    make_model(data, paths["teacher"], teacher, length)
    make_model(data, paths["student"], teacher | changed, length)
    found: dict[str, list[float]] = {"teacher forward": [], "student step": [], "distillation step": []}
    for _ in range(rounds):
        fields = stage_fields(data, place / "out", length, samples, steps, restore_from_path=str(paths["student"]))
        fields["model"].kd_teacher_restore_from_path = str(paths["teacher"])
        alone = c.DistillConfig(**fields, kd=c.KDConfig(kd_weight=0.0, lm_weight=1.0))
        both = c.DistillConfig(**fields)
        found["student step"] += training_steps(alone, place)[0][WARM_UP:]
        seconds, forward = training_steps(both, place)
        found["distillation step"] += seconds[WARM_UP:]
        found["teacher forward"] += forward[WARM_UP:]
    medians = {part: statistics.median(values) for part, values in found.items()}
    ratio = medians["distillation step"] / (medians["teacher forward"] + medians["student step"])
    return {"shape": name, "tokens": length * samples, **medians, "ratio": ratio, "samples": found}


def cut(teacher: Path, data: Path, folder: Path, sizes: dict[str, int]) -> Path:
    """A Hugging Face student of these sizes, cut by importance on a few samples."""
    from nemo_minitron.pruning.command import prune

    model = c.PruneModelConfig(
        restore_from_path=str(teacher), data=c.ModelDataConfig(data_prefix=str(data), seq_length=128, num_workers=0)
    )
    targets = c.PruneTargets(
        method="minitron", num_samples=4, statistics=False, scores_path=str(folder / "scores"),
        hidden_size_divisor=1, ffn_hidden_size_divisor=1, num_layers_divisor=1, **sizes,
    )  # fmt: skip
    export = c.ExportConfig(save_path=str(folder / "student"))
    config = c.PruneConfig(trainer=c.TrainerConfig(accelerator="cpu"), model=model, prune=targets, export=export)
    prune(config)
    return folder / "student"


def as_transformers_reads(path: Path, folder: Path) -> Path:
    """A checkpoint, or a copy of it, as a Hugging Face directory."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.conversion.convert import convert

    if open_checkpoint(path).format == "hf":
        return path
    convert(c.ConvertConfig(source=str(path), output=str(folder), to="hf"))
    return folder


def peer_cases(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> teacher, student, data and batch: of the teacher that was given, or of the shapes."""
    from nemo_minitron.data.command import prepare

    cases = {}
    if options.teacher:
        data, place = folder / "data", folder / "given"
        prepare(c.DataConfig(output=str(data), words=120_000, tokenizer=options.teacher))
        teacher = as_transformers_reads(Path(options.teacher), place / "teacher")
        student = Path(options.student) if options.student else cut(teacher, data, place, sizes_of(options.sizes))
        student = as_transformers_reads(student, place / "student-hf")
        samples, length = options.batch
        cases[Path(options.teacher).name] = {"data": data, "teacher": teacher, "student": student} | {
            "samples": samples, "length": length
        }  # fmt: skip
        return cases
    data = folder / "data"
    prepare(c.DataConfig(output=str(data), words=120_000, vocab_size=512))
    for name in options.shapes:
        teacher, changed, length, samples = SHAPES[name]
        place = folder / name.replace(" ", "-").replace(",", "")
        paths = {}
        for role, sizes in {"teacher": teacher, "student": teacher | changed}.items():
            make_model(data, place / role, sizes, length)
            paths[role] = as_transformers_reads(place / role, place / f"{role}-hf")
        cases[name] = {"data": data, **paths, "samples": samples, "length": length}
    return cases


def sizes_of(given: list[str]) -> dict[str, int]:
    return {name: int(value) for name, value in (one.split("=") for one in given)}


def compare_with_peer(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import kd_peer
    import torch

    common = {"steps": options.steps, "threads": options.threads or torch.get_num_threads()}
    rows = []
    for name, case in peer_cases(options, folder).items():
        if not rows:
            print(kd_peer.HEADER)
        rows.append(kd_peer.compare(name, plain(case | common), options.rounds, folder))
        print(kd_peer.table(rows[-1]), flush=True)
    return rows


def compare_with_parts(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from nemo_minitron.data.command import prepare

    rows = []
    prepare(c.DataConfig(output=str(folder / "data"), words=120_000, vocab_size=512))
    print(f"{'shape':<24}{'tokens':>7}{'teacher fwd':>13}{'student step':>14}{'distillation':>14}{'ratio':>7}")
    for shape in options.shapes:
        row = measure(shape, options.steps, options.rounds, folder / "data", folder)
        rows.append(row)
        print(
            f"{shape:<24}{row['tokens']:>7}{row['teacher forward']:>11.3f} s{row['student step']:>12.3f} s"
            f"{row['distillation step']:>12.3f} s{row['ratio']:>7.2f}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch; none: its own choice")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first shape, five steps, one round")
    parser.add_argument("--peer", action="store_true", help="beside plain PyTorch with transformers' models, on a CPU")
    parser.add_argument("--teacher", metavar="DIR", help="with --peer: a checkpoint of yours in the shapes' place")
    parser.add_argument("--student", metavar="DIR", help="with --teacher: its student")
    parser.add_argument("--sizes", nargs="+", metavar="NAME=N", help="with --teacher: sizes to cut a student to")
    parser.add_argument("--batch", nargs=2, type=int, default=(4, 256), metavar="N", help="samples, tokens of each")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.steps, options.rounds = options.shapes[:1], 5, 1
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"--steps must be above {WARM_UP} and --rounds at least 1")
    if options.teacher and (not options.peer or bool(options.student) == bool(options.sizes)):
        parser.error("--teacher goes with --peer and one of --student and --sizes")

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="kd-step-") as name:
        run = compare_with_peer if options.peer else compare_with_parts
        results = run(options, Path(name))
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        found = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": results}
        options.json.write_text(json.dumps(found | {"options": plain(vars(options))}, indent=1) + "\n")
    return 0


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: plainly(value) for name, value in values.items()}


def plainly(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
