"""The parts of benchmarks/gpu_check.py; each runs in a process of its own and writes what it found as JSON lines.

    python benchmarks/gpu_parts.py PART DEVICE FOLDER RESULTS [--quick]

Legend: s sequence, b micro batch, v vocabulary, h hidden.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

LENGTH, VOCABULARY, STEPS = 128, 512, 4
GRID = {"hidden_size_divisor": 64, "ffn_hidden_size_divisor": 64, "num_layers_divisor": 1}
PROMPT = "The river rises in the north"
LLAMA = {
    "family": "llama", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 32, "vocab_size": VOCABULARY, "seq_length": LENGTH, "init_method_std": 0.1,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "nemotron": LLAMA | {
        "family": "nemotron", "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu", "gated_linear_unit": False, "rotary_percent": 0.5, "ffn_hidden_size": 1024,
    },
}  # fmt: skip
#: What the quantised formats want: every input a multiple of 128.
TO_QUANTIZE = LLAMA | {"hidden_size": 512, "ffn_hidden_size": 1536}
#: Llama 3.2 1B (its model card), and a width-pruned student of it.
ONE_B = {
    "family": "llama", "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
    "num_query_groups": 8, "kv_channels": 64, "vocab_size": 128256, "seq_length": 2048, "rotary_base": 500000.0,
    "share_embeddings_and_output_weights": True,
}  # fmt: skip
ONE_B_STUDENT = {"hidden_size": 1536, "ffn_hidden_size": 5632}
#: Without a GPU the same code runs at these sizes.
REHEARSED = ONE_B | {
    "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 32, "vocab_size": 1024, "seq_length": 128,
}  # fmt: skip
REHEARSED_STUDENT = {"hidden_size": 64, "ffn_hidden_size": 128}
LOSS_SIZES = {"tokens": 8192, "vocabulary": 128256, "hidden": 2048, "repeats": 5}
LOSS_REHEARSED = {"tokens": 64, "vocabulary": 2048, "hidden": 64, "repeats": 1}

Emit = Callable[..., None]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def step(emit: Emit, name: str) -> Iterator[None]:
    """One step: its seconds, or what went wrong with it; the next step is tried all the same."""
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        emit(name, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-4000:])
    else:
        emit(f"{name}: seconds", seconds=time.perf_counter() - started)


def prepare(device: str, folder: Path, emit: Emit) -> None:
    """The corpus, and teachers with random weights."""
    from plan_check import write_checkpoint

    from nemo_minitron import config as c
    from nemo_minitron.data import command as stage

    with step(emit, "data"):
        stage.prepare(c.DataConfig(output=str(folder / "data"), words=60_000, vocab_size=VOCABULARY, workers=1))
    for name, sizes in {**SMALL, "quantized": TO_QUANTIZE}.items():
        with step(emit, f"teacher {name}"):
            write_checkpoint(folder / f"teacher-{name}", sizes, std=0.1)


def small(device: str, folder: Path, emit: Emit) -> None:
    """The whole way on small shapes: losses, scores, cuts, tokens, to be compared with another device's."""
    for family in SMALL:
        Way(family, device, folder, emit).run()


class Way:
    """finetune, score, cut, distil, convert and generate of one family on one device."""

    def __init__(self, family: str, device: str, folder: Path, emit: Emit):
        self.family, self.device, self.emit = family, device, emit
        self.data, self.teacher = folder / "data", folder / f"teacher-{family}"
        self.own = folder / f"{family}-{device}"
        self.say = lambda name, **found: emit(f"{family}: {name}", **found)

    def run(self) -> None:
        self.finetune("finetune fp32", self.device)
        if self.device == "cuda":
            self.finetune("finetune fp32, accelerator=cpu", "cpu", of="finetune fp32")
            self.finetune("finetune bf16", "cuda", of="finetune fp32", precision="bf16", tolerance=0.02)
        self.score()
        self.cut("depth", num_layers=2, method="minitron")
        self.cut("width", hidden_size=192, ffn_hidden_size=512, method="minitron")
        self.cut("width compensated", hidden_size=192, ffn_hidden_size=512, method="compensated")
        for student in ("width", "width compensated"):
            self.distil(student, "fused", "32")
        self.distil("width", "chunked", "32", of="distil width, fused, fp32")
        if self.device == "cuda":
            for form in ("fused", "chunked"):
                self.distil("width", form, "bf16", of="distil width, fused, fp32")
        self.convert()
        self.generate()

    def stage_fields(self, output: Path, device: str, precision: str, **model: Any) -> dict[str, Any]:
        from nemo_minitron import config as c

        return {
            "overwrite": True,
            "trainer": c.TrainerConfig(
                max_steps=STEPS, val_check_interval=STEPS, limit_val_batches=2, precision=precision,
                accelerator="gpu" if device == "cuda" else "cpu",
            ),
            "model": c.ModelConfig(
                nemo_path=str(output), micro_batch_size=4, global_batch_size=8, tokenizer=str(self.data / "tokenizer"),
                data=c.ModelDataConfig(data_prefix=str(self.data), seq_length=LENGTH, num_workers=0),
                optim=c.OptimConfig(lr=1e-4, sched=c.SchedConfig(warmup_steps=1, min_lr=1e-5)),
                **model,
            ),
        }  # fmt: skip

    def losses(self, name: str, of: str, manifest: Any, names: tuple[str, ...], tolerance: float) -> None:
        rows = [("step", row) for row in manifest.metrics["train"]]
        rows += [("validation after step", row) for row in manifest.metrics["validation"]]
        for loss in names:
            for kind, row in rows:
                where = f"{kind} {row['step']} {loss}"
                self.say(f"{name}, {where}", value=row[loss], of=f"{self.family}: {of}, {where}", tolerance=tolerance)

    def finetune(self, name: str, device: str, of: str = "", precision: str = "32", tolerance: float = 1e-4) -> None:
        from nemo_minitron import config as c
        from nemo_minitron.training import finetune as stage

        with step(self.say, name):
            fields = self.stage_fields(
                self.own / name.replace(" ", "-"), device, precision, restore_from_path=str(self.teacher)
            )
            manifest = stage.finetune(c.FinetuneConfig(**fields))
            self.losses(name, of or name, manifest, ("lm_loss",), tolerance)

    def prune_config(self, output: Path, **targets: Any) -> Any:
        from nemo_minitron import config as c

        return c.validated(
            c.PruneConfig(
                overwrite=True,
                trainer=c.TrainerConfig(accelerator="gpu" if self.device == "cuda" else "cpu", precision="32"),
                model=c.PruneModelConfig(
                    restore_from_path=str(self.teacher),
                    data=c.ModelDataConfig(data_prefix=str(self.data), seq_length=LENGTH),
                ),
                inference=c.InferenceConfig(batch_size=8),
                prune=c.PruneTargets(
                    num_samples=64,
                    scores_path=str(self.own / "scores"),
                    depth_by="block_influence",
                    refit="once",
                    **GRID,
                    **targets,
                ),
                export=c.ExportConfig(save_path=str(output)),
            )
        )

    def score(self) -> None:
        from nemo_minitron.artifacts import ImportanceScores
        from nemo_minitron.pruning.importance.scoring import score

        with step(self.say, "score"):
            score(self.prune_config(self.own / "none", hidden_size=192))
            scores = ImportanceScores.load(self.own / "scores")
            for name in ImportanceScores.names():
                self.fingerprint(f"score, {name}", [getattr(scores, name)], 1e-4)
            moments = [value for _, value in sorted(scores.moments.items())]
            self.fingerprint("score, second moments", moments, 1e-4)

    def cut(self, name: str, **targets: Any) -> None:
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint
        from nemo_minitron.pruning.student import cut_student

        with step(self.say, f"cut {name}"):
            output = self.own / name.replace(" ", "-")
            manifest = cut_student(self.prune_config(output, **targets))
            self.say(f"cut {name}, layers dropped", value=manifest.metrics["dropped_layers"], exact=True)
            if targets["method"] == "minitron":  # a compensated one's basis is free in sign: its losses tell
                self.fingerprint(
                    f"cut {name}, weights", [tensor.read() for tensor in open_checkpoint(output).tensors.values()], 0.0
                )

    def fingerprint(self, name: str, tensors: list[Any], tolerance: float) -> None:
        """The norm of all values, and their product with fixed random signs as a share of it."""
        import torch

        flat = torch.cat([tensor.double().flatten() for tensor in tensors])
        signs = torch.randint(0, 2, flat.shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        norm = float(flat.norm())
        self.say(f"{name}, norm", value=norm, tolerance=tolerance)
        self.say(f"{name}, projection", value=float(flat @ signs) / norm, tolerance=tolerance, absolute=True)

    def distil(self, student: str, form: str, precision: str, of: str = "") -> None:
        from nemo_minitron import config as c
        from nemo_minitron.distillation import command as stage

        name = f"distil {student}, {form}, {'bf16' if precision == 'bf16' else 'fp32'}"
        with step(self.say, name):
            fields = self.stage_fields(
                self.own / name.replace(",", "").replace(" ", "-"), self.device, precision,
                restore_from_path=str(self.own / student.replace(" ", "-")),
                kd_teacher_restore_from_path=str(self.teacher),
            )  # fmt: skip
            manifest = stage.distill(c.DistillConfig(**fields, kd=c.KDConfig(form=form)))
            # In bf16 the logits' rounding alone is a few per cent of a divergence this small.
            tolerance = 0.05 if precision == "bf16" else 1e-3
            self.losses(name, of or name, manifest, ("kd_loss", "lm_loss"), tolerance)

    def convert(self) -> None:
        from nemo_minitron import config as c
        from nemo_minitron.conversion import convert

        source = self.own / "distil-width-fused-fp32"
        for form, name in (("hf", "hf"), ("nemo1", "student.nemo")):
            with step(self.say, f"convert to {form}"):
                made = convert.convert(
                    c.ConvertConfig(
                        source=str(source), output=str(self.own / name), to=form, verify="logits", overwrite=True
                    )
                )
                difference = made.metrics["logits_relative_difference"]
                self.say(f"convert to {form}, logits differ by", value=difference, at_most=1e-4)

    def generate(self) -> None:
        with step(self.say, "generate"):
            self.say("generate, tokens", value=greedy(self.own / "hf", self.data, self.device), exact=True)


def greedy(model: Path, data: Path, device: str) -> list[int]:
    """24 tokens after the prompt, in float32."""
    from nemo_minitron import config as c
    from nemo_minitron.evaluation.generate import continuation
    from nemo_minitron.evaluation.loading import load, open_all

    settings = c.GenerateConfig(
        model=str(model), prompt=PROMPT, max_new_tokens=24, dtype="32", device=device,
        tokenizer=str(data / "tokenizer"),
    )  # fmt: skip
    (checkpoint,) = open_all([settings.model], settings)
    tokens, prompt = continuation(load(checkpoint, settings), settings)
    return tokens[prompt:]


def loss(device: str, folder: Path, emit: Emit) -> None:
    """The distillation loss, forward and backward, in bf16: milliseconds and memory beside plain autograd's."""
    import kd_loss
    import torch

    from nemo_minitron.distillation.losses import compiled

    sizes = LOSS_SIZES if on_gpu() else LOSS_REHEARSED
    options = SimpleNamespace(dtypes=["bf16"], **sizes)
    emit("loss: sizes", details=sizes)
    plain: dict[str, dict[str, float]] = {}
    for name, (start, function) in kd_loss.CASES.items():
        with step(emit, f"loss: {name}"):
            found = _timed_loss(name, function, *kd_loss.inputs(start, options, options.tokens), options.repeats)
            base = plain.setdefault(start, found)
            emit(
                f"loss {start}: {name}", milliseconds=1000 * found["seconds"],
                of_plain=found["seconds"] / base["seconds"],
                extra_mib=found["extra"] / 2**20, memory_of_plain=found["extra"] / max(1.0, base["extra"]),
                value=found["loss"], reference=base["loss"], tolerance=0.01,
            )  # fmt: skip
            emit(f"loss {start}: {name}, gradient's norm", value=found["norm"], reference=base["norm"], tolerance=0.02)
        if on_gpu():
            torch.cuda.empty_cache()
    emit("loss: devices where torch.compile does not work", value=sorted(compiled._failed))


def _timed_loss(name: str, function: Callable, arguments: tuple, wanted: tuple, repeats: int) -> dict[str, float]:
    """Median seconds, and the peak of what is allocated beyond the inputs (gradients included)."""
    import torch

    from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory

    copies = [argument.detach().clone() for argument in arguments] if "overwriting" in name else None
    seconds, extra, value, norm = [], 0.0, 0.0, 0.0
    for number in range(repeats + 1):  # the first warms up
        if copies:
            for argument, copy in zip(arguments, copies):
                argument.data.copy_(copy)
        now()
        reset_peak_memory()
        before, started = peak_memory_bytes(), now()
        result = function(*arguments)
        gradients = torch.autograd.grad(result, wanted)
        if number:
            seconds.append(now() - started)
        extra = float(peak_memory_bytes() - before)
        value = float(result.detach())
        norm = float(torch.linalg.vector_norm(gradients[0], dtype=torch.float32))
        del result, gradients
    return {"seconds": statistics.median(seconds or [now() - started]), "extra": extra, "loss": value, "norm": norm}


def shape(device: str, folder: Path, emit: Emit) -> None:
    """A 1B shape in bf16: tokens a second and peak memory of distillation and scoring, beside the plan's."""
    from plan_check import write_checkpoint

    gpu = on_gpu()
    teacher, student = (ONE_B, ONE_B_STUDENT) if gpu else (REHEARSED, REHEARSED_STUDENT)
    length = teacher["seq_length"]
    with step(emit, "1B: random weights"):
        for name, sizes in (("teacher-1b", teacher), ("student-1b", teacher | student)):
            write_checkpoint(folder / name, sizes, std=0.02, dtype="bfloat16", device="cuda" if gpu else "cpu")
    for form, batch in (("fused", 2), ("chunked", 2), ("fused", 4)):
        with step(emit, f"1B: distil, {form}, {batch} x {length}"):
            _distil_shape(folder, emit, teacher, student, form, batch)
    for moments in (True, False):
        name = "1B: score" if moments else "1B: score without second moments"
        with step(emit, name):
            _score_shape(folder, emit, name, teacher, moments)


def held() -> int:
    """Bytes that this process holds before a run: on a GPU what is allocated there; elsewhere its peak so far."""
    import gc

    import torch

    from nemo_minitron.jobs.memory import peak_memory_bytes

    gc.collect()
    return torch.cuda.memory_allocated() if on_gpu() else peak_memory_bytes()


def _planned(stage: str, teacher: dict, student: dict, batch: int, form: str = "fused", moments: bool = True) -> int:
    """The plan's peak bytes on this machine."""
    import torch

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.planning.memory import stage_memory
    from nemo_minitron.planning.run import Run

    gpu = on_gpu()
    run = Run(
        layout=Layout(cuda=gpu, bf16=True, micro_batch_size=batch, global_batch_size=2 * batch),
        seq_length=teacher["seq_length"], transformer_engine=False, fused_loss=form == "fused",
        statistics=moments, threads=torch.get_num_threads(),
        device_bytes=torch.cuda.get_device_properties(0).total_memory if gpu else None,
    )  # fmt: skip
    whole = Architecture(**teacher)
    return stage_memory(stage, whole, whole.with_sizes(**student), run).peak.total


def _distil_shape(folder: Path, emit: Emit, teacher: dict, student: dict, form: str, batch: int) -> None:
    import kd_step

    from nemo_minitron import config as c
    from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory

    length = teacher["seq_length"]
    fields = kd_step.stage_fields(
        folder / "data", folder / "out", length, batch, 6, restore_from_path=str(folder / "student-1b"),
        kd_teacher_restore_from_path=str(folder / "teacher-1b"), tokenizer=str(folder / "data" / "tokenizer"),
    )  # fmt: skip
    fields["trainer"].precision = "bf16"
    fields["model"].global_batch_size = 2 * batch
    before = held()
    reset_peak_memory()
    seconds, _ = kd_step.training_steps(c.DistillConfig(**fields, kd=c.KDConfig(form=form)), folder, forward=False)
    measured, planned = peak_memory_bytes() - before, _planned("distill", teacher, student, batch, form)
    median = statistics.median(seconds[2:])
    emit(
        f"1B: distil, {form}, {batch} x {length}", tokens_per_second=2 * batch * length / median, step_seconds=median,
        held_mib=before / 2**20, peak_mib=measured / 2**20, planned_mib=planned / 2**20,
        planned_of_measured=planned / max(1, measured),
    )  # fmt: skip


def _score_shape(folder: Path, emit: Emit, name: str, teacher: dict, moments: bool) -> None:
    from nemo_minitron import config as c
    from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory
    from nemo_minitron.pruning.importance.scoring import score

    samples, batch, length = 32, 2, teacher["seq_length"]
    before = held()
    reset_peak_memory()
    config = c.PruneConfig(
        trainer=c.TrainerConfig(precision="bf16"),
        model=c.PruneModelConfig(
            restore_from_path=str(folder / "teacher-1b"),
            data=c.ModelDataConfig(data_prefix=str(folder / "data"), seq_length=length),
        ),
        inference=c.InferenceConfig(batch_size=batch),
        prune=c.PruneTargets(
            num_samples=samples, hidden_size=teacher["hidden_size"] // 2, statistics=moments,
            scores_path=str(folder / f"scores-1b-{moments}"),
            hidden_size_divisor=64, ffn_hidden_size_divisor=64,
        ),
        export=c.ExportConfig(save_path=str(folder / "cut-1b")),
    )  # fmt: skip
    manifest = score(config)
    measured, planned = peak_memory_bytes() - before, _planned("prune", teacher, {}, batch, moments=moments)
    seconds = manifest.timings["calibration_seconds"]
    emit(
        name, tokens_per_second=manifest.metrics["tokens"] / seconds, step_seconds=seconds,
        peak_mib=measured / 2**20, planned_mib=planned / 2**20, planned_of_measured=planned / max(1, measured),
    )  # fmt: skip


def quantized(device: str, folder: Path, emit: Emit) -> None:
    """FP8 and INT4 exports, calibrated on this device, read back and asked for tokens."""
    from nemo_minitron import config as c
    from nemo_minitron.quantization import command as stage

    for qformat, error in (("fp8", 0.04), ("int4_awq", 0.2)):
        output = folder / f"quantized-{qformat}"
        with step(emit, f"quantize {qformat}"):
            source = c.CalibrationDataConfig(source=str(folder / "data"))
            made = stage.quantize(
                c.QuantizeConfig(
                    source=str(folder / "teacher-quantized"), output=str(output), qformat=qformat, data=source,
                    num_samples=16, overwrite=True,
                )
            )  # fmt: skip
            emit(
                f"quantize {qformat}, error of the weights", value=made.metrics["relative_error"], at_most=error,
                details={"device": made.details["device"]},
            )  # fmt: skip
        with step(emit, f"generate from {qformat}"):
            tokens = greedy(output, folder / "data", device)
            emit(f"generate from {qformat}, tokens", value=len(tokens), reference=24, tolerance=0.0)


PARTS = {"prepare": prepare, "small": small, "loss": loss, "shape": shape, "quantized": quantized}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    with options.results.open("a", encoding="utf-8") as file:

        def emit(name: str, **found: Any) -> None:
            file.write(json.dumps({"part": options.part, "device": options.device, "name": name, **found}) + "\n")
            file.flush()

        started = time.perf_counter()
        PARTS[options.part](options.device, options.folder, emit)
        emit(f"{options.part}: all of it", seconds=time.perf_counter() - started, whole=True)


if __name__ == "__main__":
    main()
