"""What a cut costs, in time and peak memory, beside `cp -r`; and a first and a second student, beside ModelOpt's way.

    python benchmarks/prune_cost.py [--sizes 1 2 4] [--students 0.75] [--folder DIR] [--json FILE]

Cuts: the depth cut drops every second layer of a `.nemo` archive and of a Hugging Face directory; the width cut keeps
three quarters of the hidden size and of the FFN by random scores, here and by ModelOpt on a model in memory (its
imports not counted). Each runs in a process of its own. Throughput is the
bytes that remain over the seconds of the cut; the peer is `cp -r` of the source, scaled to the same bytes. Cuts and
copies take turns, three of each, and the fastest of each counts.

Students: of a synthetic teacher, a first one of three quarters of its width (scored on 256 samples of 256 tokens, then
cut), and a second one from the same scores; compensated and not. The peer is ModelOpt's own way, which loads the model
and scores it for each student: `modelopt.torch.prune` on Megatron's model, saved by Megatron. The processes' start and
imports are in the seconds.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from convert import architecture, copy_seconds, make, remove, size_of

STUDENT_SAMPLES, STUDENT_TOKENS = 256, 256
WAYS = {
    "depth, .nemo -> .nemo": ("teacher.nemo", "student.nemo", "depth"),
    "depth, hf -> hf": ("hf", "student-hf", "depth"),
    "width, .nemo -> .nemo": ("teacher.nemo", "student.nemo", "width"),
    "width, ModelOpt": ("hf", "student-modelopt", "width"),
}


def targets(gigabytes: float, kind: str) -> dict[str, Any]:
    """Settings of the cut."""
    a = architecture(gigabytes)
    if kind == "depth":
        return {"drop_layers": list(range(2, a.num_layers + 1, 2))}
    return {"hidden_size": a.hidden_size * 3 // 4, "ffn_hidden_size": a.ffn_hidden_size * 8 // 11}


def write_scores(folder: Path, gigabytes: float) -> None:
    """Random importance scores."""
    import torch

    from nemo_minitron.artifacts import ImportanceScores

    a, generator = architecture(gigabytes), torch.Generator().manual_seed(0)
    folder.mkdir()
    ImportanceScores(
        hidden=torch.rand(2 * a.num_layers, a.hidden_size, generator=generator),
        ffn=torch.rand(a.num_layers, a.ffn_hidden_size, generator=generator),
        heads=torch.rand(a.num_layers, a.num_attention_heads * a.kv_channels, generator=generator),
        block_influence=torch.rand(a.num_layers, generator=generator),
    ).save(folder)


def cut(source: str, output: str, settings: str, scores: str) -> None:
    """One cut; prints seconds and peak memory as JSON. Runs in a process of its own."""
    from nemo_minitron import config as c
    from nemo_minitron.pruning.student import cut_student

    config = c.PruneConfig(
        model=c.PruneModelConfig(restore_from_path=source),
        prune=c.PruneTargets(method="minitron", scores_path=scores, **json.loads(settings)),
        export=c.ExportConfig(save_path=output),
        to="hf" if output.endswith("-hf") else None,
    )
    started = time.perf_counter()
    cut_student(config)
    seconds = time.perf_counter() - started
    engines = [name for name in ("nemo", "megatron", "modelopt") if name in sys.modules]
    assert not engines, engines
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def cut_in_memory(source: str, output: str, settings: str, scores: str) -> None:
    """The same cut by ModelOpt on a loaded Megatron model, the scores handed to its estimators; saved as NeMo-2."""
    import modelopt.torch.prune as mtp

    from nemo_minitron.artifacts import ImportanceScores
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.megatron.modelopt_norms import local_norms_prunable
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import save_checkpoint

    def hand_over(model: Any) -> None:
        for index, layer in enumerate(model.decoder.layers):
            layer._scores = float(found.block_influence[index])
            layer.mlp._activations = found.ffn[index].clone()
            layer.self_attention._activations = found.heads[index].clone()
        model._activations = dict(enumerate(found.hidden.clone()))

    found, layout, sizes = ImportanceScores.load(scores), Layout(cuda=False, bf16=True), json.loads(settings)
    with engine(1, Path(f"{output}.log")), parallel_ranks(layout, 1):
        started = time.perf_counter()
        teacher = open_checkpoint(source)
        model = load_model(teacher.architecture, layout, teacher, local_spec=True)
        with local_norms_prunable():
            mtp.prune(
                model,
                mode="mcore_minitron",
                constraints={"export_config": sizes},
                dummy_input=None,
                config={"forward_loop": hand_over},
            )
        architecture, place = teacher.architecture.with_sizes(**sizes), Path(output)
        save_checkpoint(model, architecture, place, output=place, to="nemo2", tokenizer=None)
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def student(teacher: str, data: str, output: str, method: str, hidden: str) -> None:
    """`minitron prune` (or ModelOpt's way) of a teacher to a hidden size; prints peak memory as JSON."""
    from nemo_minitron import config as c
    from nemo_minitron.pruning.command import prune as prune_model

    config = c.PruneConfig(
        trainer=c.TrainerConfig(accelerator="cpu", precision="bf16"),
        model=c.PruneModelConfig(
            restore_from_path=teacher, data=c.ModelDataConfig(data_prefix=data, seq_length=STUDENT_TOKENS)
        ),
        inference=c.InferenceConfig(batch_size=4),
        prune=c.PruneTargets(
            hidden_size=int(hidden), num_samples=STUDENT_SAMPLES, scores_path=f"{output}.scores-{method}",
            method=None if method == "modelopt" else method, statistics=method == "compensated", refit="once",
        ),
        export=c.ExportConfig(save_path=output),
    )  # fmt: skip
    if method == "modelopt":
        in_memory(config)
    else:
        prune_model(c.validated(config))
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def in_memory(config: Any) -> None:
    """The same by ModelOpt on Megatron's model."""
    import modelopt.torch.prune as mtp

    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.megatron.forward import load_model, parallel_ranks, run_forward
    from nemo_minitron.megatron.layout import layout_of
    from nemo_minitron.megatron.modelopt_norms import local_norms_prunable
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import save_checkpoint
    from nemo_minitron.pruning.calibration import calibration_of

    teacher = open_checkpoint(config.model.restore_from_path)
    sequences, _ = calibration_of(config, teacher).sequences(config.prune.num_samples, config.seed)
    layout, sizes = layout_of(config.trainer, config.model), {"hidden_size": config.prune.hidden_size}
    output = Path(config.export.save_path)
    with engine(config.seed, output.with_name("modelopt.log")), parallel_ranks(layout, config.seed):
        model = load_model(teacher.architecture, layout, teacher, local_spec=True)
        with local_norms_prunable():
            mtp.prune(
                model,
                mode="mcore_minitron",
                constraints={"export_config": sizes},
                dummy_input=None,
                config={"forward_loop": lambda found: run_forward(found, sequences, config.inference.batch_size)},
            )
        architecture = teacher.architecture.with_sizes(**sizes)
        save_checkpoint(model, architecture, output, output=output, to="nemo2", tokenizer=None)


def run_students(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    """First and second student of one teacher, each way."""
    measure("--data", str(folder), str(gigabytes))
    hidden = architecture(gigabytes).hidden_size
    rows = []
    for method in ("minitron", "compensated", "modelopt"):
        for number, size in (("first", hidden * 3 // 4), ("second", hidden // 2)):
            started = time.perf_counter()
            output = folder / f"student-{method}"
            found = measure("--student", str(folder / "hf"), str(folder / "data"), str(output), method, str(size))
            rows.append(
                {
                    "gigabytes": gigabytes, "method": method, "student": number,
                    "seconds": time.perf_counter() - started, "peak_bytes": found["peak"],
                }
            )  # fmt: skip
            first = next(row for row in rows if row["method"] == method)["seconds"]
            rows[-1]["of_first"] = rows[-1]["seconds"] / first
            print(student_line(rows[-1]), flush=True)
            remove(output)
    return rows


STUDENT_HEADER = f"{'GB':>6}  {'way':<13}{'student':<9}{'s':>8}{'of first':>10}{'peak MiB':>10}"


def student_line(row: dict[str, Any]) -> str:
    return (
        f"{row['gigabytes']:>6.2f}  {row['method']:<13}{row['student']:<9}{row['seconds']:>8.1f}"
        f"{row['of_first']:>10.1%}{row['peak_bytes'] / 2**20:>10.0f}"
    )


def measure(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def prepare(folder: str, gigabytes: str) -> None:
    """The teachers and the scores."""
    from nemo_minitron.config import ConvertConfig
    from nemo_minitron.conversion.convert import convert

    make(Path(folder) / "hf", float(gigabytes))
    convert(ConvertConfig(source=f"{folder}/hf", output=f"{folder}/teacher.nemo", verify="none"))
    write_scores(Path(folder) / "scores", float(gigabytes))


def prepare_data(folder: str, gigabytes: str) -> None:
    """A teacher with weights that can be run, and text to score it on."""
    import torch

    from nemo_minitron.checkpoints.checkpoint import write_checkpoint
    from nemo_minitron.checkpoints.names import canonical_shapes
    from nemo_minitron.checkpoints.tensors import Computed
    from nemo_minitron.config import DataConfig
    from nemo_minitron.data.command import prepare as prepare_text

    prepare_text(DataConfig(output=f"{folder}/data", words=60_000, vocab_size=512))
    generator, a = torch.Generator().manual_seed(0), architecture(float(gigabytes))

    def weights(shape: tuple[int, ...]) -> Any:
        drawn = torch.randn(shape, generator=generator) * 0.02
        return (drawn + 1.0 if len(shape) == 1 else drawn).bfloat16()

    tensors = {
        name: Computed(shape, "bfloat16", lambda shape=shape: weights(shape))
        for name, shape in canonical_shapes(a).items()
    }
    write_checkpoint(Path(folder) / "hf", "hf", a, tensors, None, {})


def run(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    measure("--prepare", str(folder), str(gigabytes))
    rows = []
    for name, (source, output, kind) in WAYS.items():
        copies, cuts = [], []
        for _ in range(3):
            copies.append(copy_seconds(folder / source, folder / "copy"))
            remove(folder / output)
            settings = json.dumps(targets(gigabytes, kind))
            way = "--in-memory" if output.endswith("modelopt") else "--cut"
            cuts.append(measure(way, str(folder / source), str(folder / output), settings, str(folder / "scores")))
        best, left = min(cuts, key=lambda found: found["seconds"]), size_of(folder / output)
        rate, copy_rate = left / best["seconds"], size_of(folder / source) / min(copies)
        rows.append(
            {
                "cut": name, "bytes": size_of(folder / source), "bytes_left": left, "seconds": best["seconds"],
                "gb_per_s": rate / 1e9, "cp_gb_per_s": copy_rate / 1e9, "ratio_to_cp": rate / copy_rate,
                "peak_bytes": best["peak"],
            }
        )  # fmt: skip
        print(line(rows[-1]), flush=True)
        remove(folder / output)
    return rows


HEADER = f"{'cut':<24}{'GB':>7}{'left':>7}{'s':>8}{'GB/s':>8}{'cp GB/s':>9}{'of cp':>7}{'peak MiB':>10}"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['cut']:<24}{row['bytes'] / 1e9:>7.2f}{row['bytes_left'] / 1e9:>7.2f}{row['seconds']:>8.2f}"
        f"{row['gb_per_s']:>8.2f}{row['cp_gb_per_s']:>9.2f}{row['ratio_to_cp']:>7.2f}{row['peak_bytes'] / 2**20:>10.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=float, default=[1, 2, 4], help="GB")
    parser.add_argument("--students", nargs="*", type=float, default=[0.75], help="GB")
    parser.add_argument("--folder", help="where to work; needs five times the largest size")
    parser.add_argument("--json", default="prune_cost.json", help="file to write")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--data", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cut", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--student", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(*options.prepare)
    elif options.cut:
        cut(*options.cut)
    elif options.in_memory:
        cut_in_memory(*options.in_memory)
    elif options.data:
        prepare_data(*options.data)
    elif options.student:
        student(*options.student)
    else:
        print(HEADER)
        rows = []
        for size in options.sizes:
            with tempfile.TemporaryDirectory(prefix="minitron-", dir=options.folder) as folder:
                rows += run(Path(folder), size)
        print(f"\n{STUDENT_HEADER}")
        students = []
        for size in options.students:
            with tempfile.TemporaryDirectory(prefix="minitron-", dir=options.folder) as folder:
                students += run_students(Path(folder), size)
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        Path(options.json).write_text(
            json.dumps({"cuts": rows, "students": students, "machine": machine}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
