"""Every notebook, headless, in order, from a clean workspace; shortened by settings alone.

All run the tiny preset but the one on a real model, whose teacher and text are small ones that are made here.
"""

import base64
import io
import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import models
from nemo_minitron.artifacts import Manifest
from nemo_minitron.data.synthetic import corpus as embedded
from nemo_minitron.data.tokenizer import train_bpe

HERE = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = ["introduction", *sorted(path.stem for path in HERE.glob("0*.ipynb"))]
SHORTER = [
    "data.words=40000", "data.pretrain_words=40000", "data.vocab_size=512",
    "prune.num_samples=16", "prune.num_block_samples=16", "limit_test_batches=2", "facts=40",
    *(f"{stage}.{key}" for stage in ("pretrain", "finetune", "distill")
      for key in ("max_steps=4", "val_check_interval=2", "limit_val_batches=1", "warmup_steps=1")),
]  # fmt: skip
FEWER = [f"prune.students.best.search.{key}" for key in ("measured=2", "candidates=2", "steps=2", "samples=2")]
REAL, SEARCH = "00_a_real_model", "07_search"
SMALLER = [
    "model.seq_length=32", "prune.num_samples=8", "prune.num_block_samples=8", "limit_test_batches=2",
    "prune.students.width.hidden_size=32", "prune.students.width.ffn_hidden_size=64",
    "prune.students.depth.num_layers=1", *SHORTER[-8:],
]  # fmt: skip
#: A notebook may not live on names of the one before it.
EMPTIED = """
for name in [name for name in globals() if not name.startswith('_')]: del globals()[name]
import nemo_minitron.megatron.session as _session; _session.stages_alone = True
"""


def small_teacher(folder: Path) -> list[str]:
    """A teacher of two layers and a text in `folder`; returns the settings that take them."""
    texts = list(embedded.documents("encyclopedic", "train", 20_000, 1))
    train_bpe(texts, 300, folder / "teacher")
    models.save("llama3", torch.bfloat16, folder / "teacher", vocab_size=300, max_position_embeddings=256)
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    return [f"model.restore_from_path={folder / 'teacher'}", f"data.source={folder / 'text'}"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebooks as a run leaves them, and the workspace; one kernel runs them all, emptied in between."""
    from jupyter_client.manager import start_new_kernel
    from nbclient import NotebookClient

    workspace = tmp_path_factory.mktemp("notebooks")
    for path in HERE.glob("*.ipynb"):
        shutil.copy(path, workspace)
    real = [*SMALLER, *small_teacher(tmp_path_factory.mktemp("real"))]
    environment = {**os.environ, "JUPYTER_PLATFORM_DIRS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(workspace), env=environment)
    found = {}
    try:
        for name in NAMES:
            notebook = nbformat.read(workspace / f"{name}.ipynb", as_version=4)
            resources = {"metadata": {"path": str(workspace)}}
            runner = NotebookClient(notebook, km=manager, timeout=400, resources=resources)
            runner.kc = client
            settings = " ".join({REAL: real, SEARCH: [*SHORTER, *FEWER]}.get(name, SHORTER))
            client.execute_interactive(f"import os; os.environ['NEMO_MINITRON_OVERRIDES'] = {settings!r}", silent=True)
            runner.execute(reset_kc=False)
            found[name] = notebook
            client.execute_interactive(EMPTIED, silent=True, output_hook=lambda message: None)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return found, workspace


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(notebook) -> str:
    """All text that a reader sees."""
    found = [output.get("text", "") for output in outputs(notebook)]
    return "\n".join(found + [output.get("data", {}).get("text/plain", "") for output in outputs(notebook)])


def pictures(notebook) -> list[bytes]:
    return [
        base64.b64decode(output["data"]["image/png"])
        for output in outputs(notebook)
        if "image/png" in output.get("data", {})
    ]


def test_none_is_missing():
    assert NAMES == [
        "introduction", "00_a_real_model", "01_data_preparation", "02_teacher_finetuning", "03_a_depth_pruning",
        "03_b_width_pruning", "04_a_distilling_depth_pruned_student", "04_b_distilling_width_pruned_student",
        "05_display_results", "06_evaluate_and_deploy", "07_search",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_fails_and_no_picture_is_blank(executed, name):
    from PIL import Image

    notebook = executed[0][name]
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    expected = sum("lesson.picture(" in cell.source or "lesson.shapes(" in cell.source for cell in notebook.cells)
    found = pictures(notebook)
    assert len(found) >= expected
    for png in found:
        image = Image.open(io.BytesIO(png)).convert("L")
        low, high = image.getextrema()
        assert min(image.size) > 200 and high - low > 100
        assert len(image.getcolors(256)) > 20


def test_the_numbers_shown_are_the_manifests(executed):
    notebooks, workspace = executed
    run = workspace / "runs" / "tiny"
    shown_in = {
        "teacher-corrected": "02_teacher_finetuning",
        "depth-pruned": "03_a_depth_pruning",
        "width-pruned": "03_b_width_pruning",
        "depth-distilled": "04_a_distilling_depth_pruned_student",
        "width-control": "04_b_distilling_width_pruned_student",
        "width-distilled": "05_display_results",
        "best-distilled": "07_search",
    }
    for folder, name in shown_in.items():
        metrics = Manifest.read(run / "evaluations" / folder).metrics
        row = next(line for line in text(notebooks[name]).splitlines() if line.startswith(folder.replace("-", " ")))
        assert f"{metrics['test']['loss']:.4f}" in row and f"{metrics['validation']['loss']:.4f}" in row
    tokens = Manifest.read(run / "data").metrics
    assert all(str(value) in text(notebooks["01_data_preparation"]) for value in tokens.values() if type(value) is int)
    report = json.loads((run / "report.json").read_text())
    assert {row["model"] for row in report["table"]} >= {"teacher", "width distilled"}


def test_few_lines_of_log_are_shown(executed):
    for notebook in executed[0].values():
        for output in outputs(notebook):
            assert output.get("name") != "stderr" or len(output["text"].splitlines()) < 60


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cells: cells[1]["outputs"].append({"output_type": "error", "ename": "E", "evalue": "x"}), "E: x"),
        (lambda cells: [cell.update(outputs=[]) for cell in cells if "outputs" in cell], "without outputs"),
        (lambda cells: cells[1].update(execution_count=7), "one run from top to end"),
        (lambda cells: cells[1].update(source='PRESET = "llama31_8b"'), 'PRESET = "tiny"'),
    ],
)
def test_the_check_of_committed_notebooks(tmp_path, damage, message):
    import subprocess

    check = HERE / "check.py"
    assert subprocess.run([sys.executable, check]).returncode == 0
    cells = json.loads((HERE / "02_teacher_finetuning.ipynb").read_text())
    damage(cells["cells"])
    path = tmp_path / "damaged.ipynb"
    path.write_text(json.dumps(cells))
    found = subprocess.run([sys.executable, check, path], capture_output=True, text=True)
    assert found.returncode == 1 and message in found.stderr
