"""Converts synthetic checkpoints every way and measures throughput and peak memory beside `cp -r` of the same bytes.

    python benchmarks/convert.py [--sizes 1 2 4] [--folder DIR] [--json FILE] [--quick]
                                 [--ways "hf -> gguf" "gguf -> hf"]

Each conversion runs in a process of its own, so its peak resident memory is that of interpreter and conversion.
Throughput is the source's bytes over the seconds of the conversion (without the interpreter's start, which the JSON
has), and its ratio to `cp -r` of the source. Conversions and copies take turns, three of each, and the fastest of each
counts. Nothing is verified but where the name says so.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Name -> (source, result, settings); the sources are made by earlier conversions.
WAYS = {
    "hf -> nemo2": ("hf", "nemo2", {"to": "nemo2"}),
    "nemo2 -> nemo1": ("nemo2", "archive.nemo", {}),
    "nemo1 -> nemo2": ("archive.nemo", "again", {"to": "nemo2"}),
    "nemo2 -> hf": ("nemo2", "hf-again", {"to": "hf"}),
    "hf -> nemo1": ("hf", "from-hf.nemo", {}),
    "nemo1 -> hf": ("archive.nemo", "hf-from-nemo1", {"to": "hf"}),
    "nemo2 -> nemo1 (zarr)": ("nemo2", "zarr.nemo", {"weights": "zarr"}),
    "nemo1 (zarr) -> nemo2": ("zarr.nemo", "from-zarr", {"to": "nemo2"}),
    "nemo2 -> bridge": ("nemo2", "bridge", {"to": "bridge"}),
    "bridge -> nemo2": ("bridge", "from-bridge", {"to": "nemo2"}),
    "hf -> gguf": ("hf", "model.gguf", {}),
    "gguf -> hf": ("model.gguf", "hf-from-gguf", {"to": "hf"}),
    "hf -> nemo2, verify=tensors": ("hf", "verified", {"to": "nemo2", "verify": "tensors"}),
}
QUICK = ("hf -> nemo2", "nemo2 -> nemo1", "nemo1 -> hf")


def architecture(gigabytes: float) -> Any:
    """A Llama in bf16 of about so many GB."""
    from nemo_minitron.architecture import Architecture

    fields = {
        "family": "llama", "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 16,
        "num_query_groups": 8, "kv_channels": 128, "vocab_size": 64000, "seq_length": 4096,
    }  # fmt: skip
    one = Architecture(num_layers=1, **fields)
    left = gigabytes * 1e9 / 2 - (one.parameters() - one.layer_parameters())
    return Architecture(num_layers=max(1, round(left / one.layer_parameters())), **fields)


def letters() -> Any:
    """A tokenizer of a few letters, which a GGUF cannot do without."""
    from nemo_minitron.checkpoints.file_bytes import InMemory
    from nemo_minitron.checkpoints.tokenizer import Tokenizer

    words = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
             "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}  # fmt: skip
    files = {"tokenizer.json": words, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    data = {name: json.dumps(value).encode() for name, value in files.items()}
    return Tokenizer(files={name: InMemory(Path(name), 0, len(text), text) for name, text in data.items()})


def make(folder: Path, gigabytes: float) -> None:
    """Writes the Hugging Face checkpoint that everything starts from: random bits of finite bf16 values."""
    import torch

    from nemo_minitron.checkpoints.checkpoint import write_checkpoint
    from nemo_minitron.checkpoints.formats.base import WriteOptions
    from nemo_minitron.checkpoints.names import canonical_shapes
    from nemo_minitron.checkpoints.tensors import Computed

    shape = architecture(gigabytes)
    generator = torch.Generator().manual_seed(0)

    def random(size: tuple[int, ...]) -> Any:
        return torch.randint(-(1 << 14), 1 << 14, size, dtype=torch.int16, generator=generator).view(torch.bfloat16)

    tensors = {
        name: Computed(size, "bfloat16", lambda size=size: random(size))
        for name, size in canonical_shapes(shape).items()
    }
    write_checkpoint(folder, "hf", shape, tensors, letters(), {}, WriteOptions(shard_bytes=1_000_000_000))


def convert(source: str, output: str, settings: str) -> None:
    """One conversion; prints seconds and peak memory as JSON. Runs in a process of its own."""
    started = time.perf_counter()
    from nemo_minitron.config import ConvertConfig, validated
    from nemo_minitron.conversion.convert import convert as run

    config = validated(ConvertConfig(**{"verify": "none", **json.loads(settings)}, source=source, output=output))
    imported = time.perf_counter()
    run(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engines = [name for name in ("nemo", "megatron") if name in sys.modules]
    print(json.dumps({"start": imported - started, "seconds": time.perf_counter() - imported, "peak": peak}))
    assert not engines, engines


def measure(function: list[str]) -> dict[str, float]:
    """Runs this script's function in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *function], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds of `cp -r`, the copy removed again."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - started
    remove(target)
    return seconds


def run(folder: Path, gigabytes: float, ways: list[str]) -> list[dict[str, Any]]:
    """All conversions of one size."""
    measure(["--make", str(folder / "hf"), str(gigabytes)])
    rows = []
    for name in ways:
        source, output, settings = WAYS[name]
        copies, best = [], None
        for _ in range(3):
            copies.append(copy_seconds(folder / source, folder / "copy"))
            remove(folder / output)
            found = measure(["--convert", str(folder / source), str(folder / output), json.dumps(settings)])
            best = found if best is None or found["seconds"] < best["seconds"] else best
        copies.append(copy_seconds(folder / source, folder / "copy"))
        size = size_of(folder / source)
        rows.append(
            {
                "conversion": name,
                "bytes": size,
                "seconds": best["seconds"],
                "start_seconds": best["start"],
                "gb_per_s": size / best["seconds"] / 1e9,
                "cp_gb_per_s": size / min(copies) / 1e9,
                "ratio_to_cp": min(copies) / best["seconds"],
                "peak_bytes": best["peak"],
            }
        )
        print(line(rows[-1]), flush=True)
        ahead = {WAYS[later][0] for later in ways[ways.index(name) + 1 :]}
        for path in folder.iterdir():
            if path.name not in ahead:  # or the page cache would not hold what is measured next
                remove(path)
    return rows


HEADER = f"{'conversion':<30}{'GB':>7}{'s':>8}{'GB/s':>8}{'cp GB/s':>9}{'of cp':>7}{'peak MiB':>10}"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['conversion']:<30}{row['bytes'] / 1e9:>7.2f}{row['seconds']:>8.2f}{row['gb_per_s']:>8.2f}"
        f"{row['cp_gb_per_s']:>9.2f}{row['ratio_to_cp']:>7.2f}{row['peak_bytes'] / 2**20:>10.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 2, 4], help="GB")
    parser.add_argument("--folder", help="where to work; needs five times the largest size")
    parser.add_argument("--json", default="convert.json", help="file to write")
    parser.add_argument("--quick", action="store_true", help="0.25 GB and three ways only")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which; sources are made by earlier ones"
    )
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), float(options.make[1]))
    elif options.convert:
        convert(*options.convert)
    else:
        print(HEADER)
        rows = []
        for size in [0.25] if options.quick else options.sizes:
            with tempfile.TemporaryDirectory(prefix="minitron-", dir=options.folder) as folder:
                rows += run(Path(folder), size, list(QUICK) if options.quick else options.ways)
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        Path(options.json).write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
