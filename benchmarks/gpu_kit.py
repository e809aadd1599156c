"""Packs the tree with the wheels that a bare CUDA machine lacks: what benchmarks/gpu_check.py needs, with no network.

    python benchmarks/gpu_kit.py [FOLDER]        # or: make gpu-kit

The machine is one with Python 3.12, PyTorch 2.11, transformers 5 and NumPy 2 and nothing of NeMo;
requirements/gpu-kit.txt names what is added. In FOLDER (build/gpu-kit) there are then wheels/ and gpu-kit.tar, which
holds them, the committed tree and run.sh. On the machine with the GPU:

    tar xf gpu-kit.tar && bash gpu-kit/run.sh

Needs a Python 3.12 here, so that its wheels are gathered; name it by PYTHON312 if it is not on the PATH.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 60
#: Files of a wheel that nothing here uses: PuLP's solvers; its import is enough for ModelOpt.
UNUSED = {"pulp": "pulp/solverdir/"}
RUN = """#!/usr/bin/env bash
# Installs the wheels into site/ beside this file, touches nothing else of the machine, and runs the check.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target site wheels/*.whl
export PYTHONPATH="$PWD/site:$PWD/tree"
exec python3 tree/benchmarks/gpu_check.py "$@"
"""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "gpu-kit")
    wheels = folder / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    wheels.mkdir(parents=True)
    gather(python312(), wheels)
    for package, unused in UNUSED.items():
        for wheel in wheels.glob(f"{package}-*.whl"):
            strip(wheel, unused)
    kit = folder / "gpu-kit.tar"
    pack(kit, wheels)
    size = kit.stat().st_size / 1e6
    print(f"{kit}: {size:.1f} MB, {len(list(wheels.iterdir()))} wheels")
    if size > LIMIT_MB:
        sys.exit(f"the kit is larger than {LIMIT_MB} MB")


def python312() -> str:
    """A Python 3.12 with venv."""
    names = [os.environ.get("PYTHON312"), "python3.12", sys.executable]
    for name in filter(None, names):
        asked = [name, "-c", "import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))"]
        if shutil.which(name) and subprocess.run(asked, capture_output=True).returncode == 0:
            return name
    sys.exit("no Python 3.12 found: name one, PYTHON312=/path/to/python3.12")


def gather(python: str, wheels: Path) -> None:
    """Downloads the wheels, and builds those that are published as sources only."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([python, "-m", "venv", name], check=True)
        pip = [f"{name}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--upgrade", "pip", "setuptools", "wheel"], check=True)
        wanted = str(ROOT / "requirements" / "gpu-kit.txt")
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), "-r", wanted], check=True)


def strip(wheel: Path, unused: str) -> None:
    """Takes the files under `unused` out of a wheel and its RECORD."""
    made = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as after:
        for item in before.infolist():
            if item.filename.startswith(unused):
                continue
            data = before.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = [line for line in data.decode().splitlines() if not line.startswith(unused)]
                data = ("\n".join(lines) + "\n").encode()
            after.writestr(item, data)
    made.replace(wheel)


def pack(kit: Path, wheels: Path) -> None:
    """Writes the archive: wheels/, tree/ as it is committed, run.sh, and SHA256SUMS of the wheels."""
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    sums = "".join(f"{digest(path)}  wheels/{path.name}\n" for path in sorted(wheels.iterdir()))
    with tarfile.open(kit, "w") as file:
        file.add(wheels, "gpu-kit/wheels")
        for name, text, mode in (("run.sh", RUN, 0o755), ("SHA256SUMS", sums, 0o644)):
            member = tarfile.TarInfo(f"gpu-kit/{name}")
            member.size, member.mode = len(text.encode()), mode
            file.addfile(member, io.BytesIO(text.encode()))
        with tarfile.open(fileobj=io.BytesIO(tree)) as committed:
            for member in committed.getmembers():
                data = committed.extractfile(member) if member.isfile() else None
                member.name = f"gpu-kit/tree/{member.name}"
                file.addfile(member, data)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
