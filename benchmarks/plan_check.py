"""What `minitron plan` predicts beside what real runs on a CPU take.

    python benchmarks/plan_check.py [--cases NAME ...] [--json FILE] [--quick] [--fixed-only]

Each case is a stage (`minitron finetune`, `minitron distill`, the scoring of `minitron prune`) of three optimizer
steps, or four batches, in a process of its own. Measured is the peak resident memory of the stage over what is resident
once NeMo is imported. The framework's own share is measured too, once a stage, on a model of one layer and 64 channels:
what that run takes beyond its prediction is taken off each other run of the stage, and stands in its own line.

Measured twice: as users run it, and with glibc's threshold for mapping memory fixed (MALLOC_MMAP_THRESHOLD_=65536), so
that what PyTorch frees goes back at once. The first includes what glibc keeps of freed blocks below 32 MiB.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FIXED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STEPS = 3


def llama(layers: int, hidden: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    """Sizes of a Llama in its usual proportions: heads of 64, two a query group, FFN 2.75 times as wide."""
    fields = {
        "family": "llama", "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 64, "num_query_groups": hidden // 128, "kv_channels": 64,
        "vocab_size": vocabulary,
    }  # fmt: skip
    return fields | changes


def nemotron(layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    changes = {
        "family": "nemotron", "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu", "gated_linear_unit": False, "rotary_percent": 0.5,
        "ffn_hidden_size": 4 * hidden,
    }  # fmt: skip
    return llama(layers, hidden, vocabulary, **changes)


SMALLEST = llama(1, 64, 1024, num_attention_heads=2, num_query_groups=1, kv_channels=32)
#: Name -> stage, model (the teacher), student, sequence, micro batch, further settings.
CASES: dict[str, dict[str, Any]] = {
    "finetune, 4 x 256": {"stage": "finetune", "model": llama(4, 256, 8192), "seq": 256, "batch": 4},
    "finetune, 8 x 512": {"stage": "finetune", "model": llama(8, 512, 16384), "seq": 256, "batch": 2},
    "finetune, long": {"stage": "finetune", "model": llama(4, 512, 8192), "seq": 512, "batch": 4},
    "finetune, 12 x 768": {"stage": "finetune", "model": llama(12, 768, 32768), "seq": 256, "batch": 1},
    "finetune, vocabulary": {"stage": "finetune", "model": llama(4, 384, 32768), "seq": 256, "batch": 4},
    "finetune, nemotron": {"stage": "finetune", "model": nemotron(6, 512, 16384), "seq": 256, "batch": 4},
    "finetune, bf16": {"stage": "finetune", "model": llama(6, 512, 16384), "seq": 256, "batch": 4, "bf16": True},
    "distill, depth": {
        "stage": "distill", "model": llama(8, 512, 16384), "student": {"num_layers": 4}, "seq": 256, "batch": 4,
    },
    "distill, width": {
        "stage": "distill", "model": llama(8, 768, 32768), "seq": 256, "batch": 2,
        "student": {"hidden_size": 512, "ffn_hidden_size": 1408},
    },
    "distill, long": {
        "stage": "distill", "model": llama(6, 512, 8192), "student": {"num_layers": 4}, "seq": 512, "batch": 4,
    },
    "distill, chunked": {
        "stage": "distill", "model": llama(6, 512, 16384), "student": {"num_layers": 4}, "seq": 256, "batch": 4,
        "form": "chunked",
    },
    "distill, small student": {
        "stage": "distill", "model": llama(12, 768, 8192), "seq": 256, "batch": 1,
        "student": {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704},
    },
    "finetune, tensor 2": {
        "stage": "finetune", "model": llama(8, 512, 16384), "seq": 256, "batch": 4, "tensor": 2,
    },
    "finetune, pipeline 2": {
        "stage": "finetune", "model": llama(7, 512, 16384), "seq": 256, "batch": 4, "pipeline": 2,
    },
    "distill, tensor 2": {
        "stage": "distill", "model": llama(8, 512, 16384), "student": {"num_layers": 4}, "seq": 256, "batch": 4,
        "tensor": 2,
    },
    "distill, pipeline 2": {
        "stage": "distill", "model": llama(8, 512, 16384), "student": {"num_layers": 4}, "seq": 256, "batch": 4,
        "pipeline": 2,
    },
    "prune, scoring": {"stage": "prune", "model": llama(8, 512, 16384), "seq": 256, "batch": 4},
    "prune, long": {"stage": "prune", "model": llama(4, 512, 8192), "seq": 512, "batch": 8},
}  # fmt: skip
QUICK = ("finetune, 4 x 256", "finetune, long", "distill, depth", "prune, scoring")
SMALL = {
    "finetune": {"stage": "finetune", "model": SMALLEST, "seq": 128, "batch": 1},
    "distill": {"stage": "distill", "model": SMALLEST, "student": {}, "seq": 128, "batch": 1},
    "prune": {"stage": "prune", "model": SMALLEST, "seq": 128, "batch": 1},
}


def ranks(case: dict[str, Any]) -> int:
    return case.get("tensor", 1) * case.get("pipeline", 1)


def predicted(case: dict[str, Any]) -> Any:
    """The planner's peak of a case."""
    from nemo_minitron.architecture import Architecture
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.planning.memory import stage_memory
    from nemo_minitron.planning.run import Run

    teacher = Architecture(**case["model"])
    student = teacher.with_sizes(**case["student"]) if "student" in case else None
    layout = Layout(
        cuda=False, bf16=bool(case.get("bf16")), micro_batch_size=case["batch"], global_batch_size=2 * case["batch"],
        devices=ranks(case), tensor_parallel=case.get("tensor", 1), pipeline_parallel=case.get("pipeline", 1),
    )  # fmt: skip
    run = Run(layout=layout, seq_length=case["seq"], fused_loss=case.get("form") != "chunked", threads=1)
    return stage_memory(case["stage"], teacher, student, run).peak


def write_checkpoint(
    folder: Path, sizes: dict[str, Any], std: float = 0.02, dtype: str = "float32", device: str = "cpu"
) -> None:
    """A Hugging Face checkpoint of random weights, drawn on `device`."""
    import torch

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.checkpoint import write_checkpoint as write
    from nemo_minitron.checkpoints.formats.base import WriteOptions
    from nemo_minitron.checkpoints.names import canonical_shapes
    from nemo_minitron.checkpoints.tensors import Computed

    shape, generator = Architecture(**sizes), torch.Generator(device).manual_seed(0)

    def draw(size: tuple[int, ...]) -> Any:
        return (torch.randn(size, generator=generator, device=device) * std).to(getattr(torch, dtype)).cpu()

    tensors = {
        name: Computed(size, dtype, lambda size=size: draw(size)) for name, size in canonical_shapes(shape).items()
    }
    write(folder, "hf", shape, tensors, None, {}, WriteOptions(shard_bytes=1_000_000_000))


def make_inputs(case: str, folder: str) -> None:
    """Writes the checkpoints of a case; runs in a process of its own."""
    spec, place = json.loads(case), Path(folder)
    write_checkpoint(place / "teacher", spec["model"])
    if "student" in spec:
        write_checkpoint(place / "student", spec["model"] | spec["student"])


def run_case(case: str, data: str, folder: str) -> None:
    """One case; prints its memory as JSON. Runs in a process of its own."""
    import torch
    from nemo.collections import llm  # noqa: F401
    from nemo.collections.llm.modelopt.distill import model  # noqa: F401

    from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory
    from nemo_minitron.training import history  # noqa: F401

    torch.set_num_threads(1)
    reset_peak_memory()
    before = peak_memory_bytes()
    run_stage(json.loads(case), data, Path(folder))
    print(json.dumps({"base": before, "extra": peak_memory_bytes() - before}), flush=True)


def run_stage(case: dict[str, Any], data: str, folder: Path) -> None:
    from nemo_minitron import config as c
    from nemo_minitron.distillation.command import distill
    from nemo_minitron.pruning.importance.scoring import score
    from nemo_minitron.training.finetune import finetune

    precision = "bf16" if case.get("bf16") else "32"
    its_data = c.ModelDataConfig(data_prefix=data, seq_length=case["seq"], num_workers=0)
    trainer = c.TrainerConfig(
        max_steps=STEPS, val_check_interval=STEPS, limit_val_batches=1, accelerator="cpu", precision=precision,
        devices=ranks(case),
    )  # fmt: skip
    common = {
        "nemo_path": str(folder / "out"), "micro_batch_size": case["batch"], "global_batch_size": 2 * case["batch"],
        "data": its_data, "tensor_model_parallel_size": case.get("tensor", 1),
        "pipeline_model_parallel_size": case.get("pipeline", 1),
    }  # fmt: skip
    if case["stage"] == "finetune":
        model = c.ModelConfig(init="random", architecture={**case["model"], "seq_length": case["seq"]}, **common)
        finetune(c.FinetuneConfig(trainer=trainer, model=model))
    elif case["stage"] == "distill":
        paths = {"restore_from_path": "student", "kd_teacher_restore_from_path": "teacher"}
        model = c.ModelConfig(**{name: str(folder / place) for name, place in paths.items()}, **common)
        distill(c.DistillConfig(trainer=trainer, model=model, kd=c.KDConfig(form=case.get("form", "fused"))))
    else:
        model = c.PruneModelConfig(restore_from_path=str(folder / "teacher"), data=its_data)
        targets = c.PruneTargets(num_samples=4 * case["batch"], hidden_size=256, scores_path=str(folder / "scores"))
        inference, export = c.InferenceConfig(batch_size=case["batch"]), c.ExportConfig(save_path=str(folder / "out"))
        score(c.PruneConfig(trainer=trainer, model=model, prune=targets, inference=inference, export=export))


def call(*arguments: str, ranks: int = 1, **environment: str) -> str:
    """Runs this script's function in a fresh process, or in as many as there are ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, __file__, *arguments]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command[1:1] = launcher
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def measure(case: dict[str, Any], data: str, environment: dict[str, str]) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="plan-check-") as folder:
        if case["stage"] != "finetune":
            call("--inputs", json.dumps(case), folder)
        said = call("--case", json.dumps(case), data, folder, ranks=ranks(case), **environment).splitlines()
        found = [json.loads(text) for text in said if text.startswith('{"base"')]
        assert len(found) == ranks(case), said
        return max(found, key=lambda rank: rank["extra"])


def make_data(folder: str) -> None:
    from nemo_minitron.config import DataConfig
    from nemo_minitron.data.command import prepare

    prepare(DataConfig(output=folder, words=60_000, vocab_size=512, workers=1))


def frameworks(stages: list[str], data: str, ways: dict[str, dict[str, str]]) -> dict[str, dict[str, int]]:
    """Stage -> way of measuring -> what the smallest model's run takes beyond its prediction."""
    found: dict[str, dict[str, int]] = {}
    for stage in stages:
        small = predicted(SMALL[stage]).total
        found[stage] = {way: measure(SMALL[stage], data, env)["extra"] - small for way, env in ways.items()}
    return found


HEADER = (
    f"{'case':<24}{'seq':>5}{'batch':>6}{'moment':>19}{'predicted':>11}{'measured':>10}{'ratio':>7}"
    f"{'default malloc':>16}{'ratio':>7}"
)


def line(row: dict[str, Any]) -> str:
    plain = f"{'':>16}{'':>7}"
    if "default" in row["measured"]:
        plain = f"{row['measured']['default'] / 2**20:>16.0f}{row['ratio']['default']:>7.3f}"
    return (
        f"{row['case']:<24}{row['seq']:>5}{row['batch']:>6}{row['moment']:>19}{row['predicted'] / 2**20:>11.0f}"
        f"{row['measured']['fixed'] / 2**20:>10.0f}{row['ratio']['fixed']:>7.3f}{plain}"
    )


def check(name: str, data: str, ways: dict[str, dict[str, str]], framework: dict[str, int]) -> dict[str, Any]:
    """One case measured every way."""
    case, peak = CASES[name], predicted(CASES[name])
    raw = {way: measure(case, data, environment)["extra"] for way, environment in ways.items()}
    measured = {way: extra - framework[way] for way, extra in raw.items()}
    return {
        "case": name, "stage": case["stage"], "seq": case["seq"], "batch": case["batch"], "moment": peak.moment,
        "predicted": peak.total, "by_kind": peak.by_kind(), "measured": measured, "with_framework": raw,
        "ratio": {way: peak.total / bytes_ for way, bytes_ in measured.items()}, "sizes": case,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="NAME", default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="four cases")
    parser.add_argument("--fixed-only", action="store_true", help="only with glibc's threshold fixed")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case or options.inputs or options.data:
        run_case(*options.case) if options.case else make_inputs(*options.inputs) if options.inputs else make_data(
            options.data
        )
        return
    ways = {"fixed": FIXED} if options.fixed_only else {"fixed": FIXED, "default": {}}
    names = QUICK if options.quick else options.cases
    with tempfile.TemporaryDirectory(prefix="plan-check-") as folder:
        data = f"{folder}/data"
        call("--data", data)
        framework = frameworks(list(dict.fromkeys(CASES[name]["stage"] for name in names)), data, ways)
        shares = ", ".join(f"{stage} {found['fixed'] / 2**20:.0f}" for stage, found in framework.items())
        print(f"MiB over what imports take; the framework's share, taken off: {shares}\n{HEADER}", flush=True)
        rows = []
        for name in names:
            rows.append(check(name, data, ways, framework[CASES[name]["stage"]]))
            print(line(rows[-1]), flush=True)
    if options.json:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
        found = {"rows": rows, "framework": framework, "machine": machine}
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
