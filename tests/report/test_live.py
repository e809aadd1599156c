"""What a notebook shows of a run that works."""

import io
import json
import shutil

import pytest

import made_runs
from nemo_minitron.errors import MinitronError
from nemo_minitron.report import live

HISTORY = made_runs.history(2.0)


class Running:
    """A stage that trains, as Job and History leave it: partial.json, and a TensorBoard file that grows."""

    def __init__(self, run, name: str = "teacher"):
        from torch.utils.tensorboard import SummaryWriter

        self.output, self.partial = run / name, run / f".{name}.partial"
        self.partial.mkdir(parents=True)
        told = {"stage": "finetune", "key": "k", "config": {"trainer": {"max_steps": 20}}}
        (self.partial / "partial.json").write_text(json.dumps(told))
        self.writer = SummaryWriter(str(self.partial / "tensorboard"))

    def train(self, first: int, last: int) -> None:
        for split in ("train", "validation"):
            for line in HISTORY[split]:
                if first <= line["step"] <= last:
                    self.writer.add_scalar(f"{split}/lm_loss", line["lm_loss"], line["step"])
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()
        shutil.rmtree(self.partial)
        made_runs.stage(self.output, "finetune", 9, metrics=HISTORY)


def test_a_running_stage_is_read_on_from_where_the_last_look_ended(tmp_path):
    running = Running(tmp_path)
    watch = live.Watch(tmp_path)
    assert watch.look()[1][0].step is None
    for last in (5, 10, 20):
        running.train({5: 1, 10: 6, 20: 11}[last], last)
        ended, (work,) = watch.look()
        assert ended == [] and (work.step, work.steps, work.stage) == (last, 20, "teacher correction")
        assert [line["step"] for line in work.history["train"]] == list(range(1, last + 1))
        assert [line["step"] for line in work.history["validation"]] == [step for step in (10, 20) if step <= last]
    assert work.newest("validation")["lm_loss"] == pytest.approx(HISTORY["validation"][1]["lm_loss"], rel=1e-6)
    assert "step 20 of 20" in work.line() and f"{HISTORY['train'][-1]['lm_loss']:.4f}" in work.line()
    running.end()
    (work,), working = watch.look()
    assert working == [] and work.ended and work.history["train"] == HISTORY["train"] and work.seconds == 19.0


def test_what_was_done_before_the_watch_is_not_shown(tmp_path):
    made_runs.flow(tmp_path / "run")
    watch = live.Watch(tmp_path / "run")
    assert watch.look() == ([], [])
    made_runs.stage(tmp_path / "run" / "teacher", "finetune", 30, metrics=HISTORY)
    assert [work.folder for work in watch.look()[0]] == ["teacher"]


def test_a_resumed_training_is_one_history(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    running = Running(tmp_path)
    running.train(1, 14)
    running.writer.close()
    again = SummaryWriter(str(running.partial / "tensorboard"), purge_step=10, filename_suffix=".later")
    again.add_scalar("train/lm_loss", 99.0, 11)
    again.close()
    (work,) = live.Watch(tmp_path).look()[1]
    assert [line["step"] for line in work.history["train"]] == [*range(1, 11), 11]
    assert work.history["train"][-1]["lm_loss"] == 99.0


def test_a_terminal_gets_a_line_a_validation(tmp_path):
    import time

    said = io.StringIO()
    with live.watching(tmp_path, every=0.02, view=live.Terminal(said)):
        running = Running(tmp_path)
        for step in range(1, 21):
            running.train(step, step)
            if step in (10, 20):
                time.sleep(0.3)
        running.end()
    lines = said.getvalue().splitlines()
    assert len(lines) == 3 and "step 10 of 20" in lines[0] and "step 20 of 20" in lines[1] and "done" in lines[2]


def test_a_notebook_gets_bars_lines_and_one_curve(tmp_path):
    running = Running(tmp_path, "<b>student-distilled")
    running.train(1, 10)
    watch = live.Watch(tmp_path)
    view = live.Notebook.__new__(live.Notebook)
    view.curve = (None, "")
    text = view.page(*watch.look())
    assert 'value="10" max="20"' in text and "<b>" not in text and text.count("<img ") == 1
    assert text.count("data:image/svg+xml;base64,") == 1 and "http" not in text
    curve = view.curve
    assert view.page(*watch.look()).count("<img ") == 1 and view.curve is curve  # nothing new: not drawn again
    running.end()
    text = view.page(*watch.look())
    assert "<progress" not in text and "done" in text and text.count("<img ") == 1


NOTEBOOK = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from nemo_minitron.report import live
from test_live import Running

with live.watching({run!r}, every=0.1):
    running = Running(Path({run!r}))
    for step in range(1, 21):
        running.train(step, step)
        time.sleep(0.05)
    running.end()
"""


def test_in_a_kernel_one_output_is_drawn_over_and_over(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import sys

    import nbformat

    source = NOTEBOOK.format(paths=[path for path in sys.path if path], run=str(tmp_path / "run"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    shown = output["data"]["text/html"]
    assert output["output_type"] == "display_data" and "done" in shown and shown.count("<img ") == 1


def test_a_command_runs_beside_and_its_failure_is_told(tmp_path):
    said = io.StringIO()
    run = tmp_path / "data"
    out = live.run_command(
        ["data", f"output={run}", "words=2000", "vocab_size=300", "workers=1"], run, every=0.1, view=live.Terminal(said)
    )
    assert f"data: {run}" in out and "data: done" in said.getvalue()
    with pytest.raises(MinitronError, match="(?s)exit code 2.*wordz is not a setting"):
        live.run_command(["data", f"output={run}", "wordz=2"], run, view=live.Terminal(said))


def test_a_real_training_is_watched(tiny, tmp_path):
    from nemo_minitron import config as c
    from nemo_minitron.training.finetune import finetune

    said, output = io.StringIO(), tmp_path / "corrected"
    fields = tiny.training(output, steps=2, restore_from_path=str(tiny.teacher))
    with live.watching(output, every=0.05, view=live.Terminal(said)) as watch:
        manifest = finetune(c.FinetuneConfig(**fields))
        seen = dict(watch.events)
    assert list(seen) == [output.name]
    last = said.getvalue().splitlines()[-1]
    assert "done" in last and "step 2 of 2" in last
    assert f"train LM loss {manifest.metrics['train'][-1]['lm_loss']:.4f}" in last
