"""What a cut costs: time and peak memory of depth and width cuts of synthetic checkpoints, beside `cp -r`.

    python benchmarks/prune_cost.py [--sizes 1 2 4] [--folder DIR] [--json FILE]

The depth cut drops every second layer of a `.nemo` archive and of a Hugging Face directory; the width cut keeps three
quarters of the hidden size and of the FFN by random scores. Each runs in a process of its own. Throughput is the bytes
that remain over the seconds of the cut; the peer is `cp -r` of the source, scaled to the same bytes. Cuts and copies
take turns, three of each, and the fastest of each counts.
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

WAYS = {
    "depth, .nemo -> .nemo": ("teacher.nemo", "student.nemo", "depth"),
    "depth, hf -> hf": ("hf", "student-hf", "depth"),
    "width, .nemo -> .nemo": ("teacher.nemo", "student.nemo", "width"),
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
    from nemo_minitron.pruning.stage import prune

    config = c.PruneConfig(
        model=c.PruneModelConfig(restore_from_path=source),
        prune=c.PruneTargets(**json.loads(settings)),
        export=c.ExportConfig(save_path=output),
        to="hf" if output.endswith("-hf") else None,
    )
    started = time.perf_counter()
    prune(config, scores)
    seconds = time.perf_counter() - started
    engines = [name for name in ("nemo", "megatron", "modelopt") if name in sys.modules]
    assert not engines, engines
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def prepare(folder: str, gigabytes: str) -> None:
    """The teachers and the scores."""
    from nemo_minitron.checkpoints.convert import convert
    from nemo_minitron.config import ConvertConfig

    make(Path(folder) / "hf", float(gigabytes))
    convert(ConvertConfig(source=f"{folder}/hf", output=f"{folder}/teacher.nemo", verify="none"))
    write_scores(Path(folder) / "scores", float(gigabytes))


def run(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    measure("--prepare", str(folder), str(gigabytes))
    rows = []
    for name, (source, output, kind) in WAYS.items():
        copies, cuts = [], []
        for _ in range(3):
            copies.append(copy_seconds(folder / source, folder / "copy"))
            remove(folder / output)
            settings = json.dumps(targets(gigabytes, kind))
            cuts.append(measure("--cut", str(folder / source), str(folder / output), settings, str(folder / "scores")))
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
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 2, 4], help="GB")
    parser.add_argument("--folder", help="where to work; needs five times the largest size")
    parser.add_argument("--json", default="prune_cost.json", help="file to write")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cut", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(*options.prepare)
    elif options.cut:
        cut(*options.cut)
    else:
        print(HEADER)
        rows = []
        for size in options.sizes:
            with tempfile.TemporaryDirectory(prefix="minitron-", dir=options.folder) as folder:
                rows += run(Path(folder), size)
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        Path(options.json).write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
