"""Shows a run while it works: a bar and a loss curve in a notebook cell, a line a validation on a terminal.

What is shown is read from the run's folders, where a stage that works leaves its TensorBoard file and its settings. It
is therefore the same for a command in another process, on many ranks, and for a call in this one::

    with live.watching("runs/tiny"):
        run_flow(config)

    live.run_command(["flow", "output_dir=runs/tiny"], run="runs/tiny")

What NeMo, Megatron and ModelOpt say goes to a file of each stage: `nemo_minitron.report.stages.log_files`.
"""

import base64
import contextlib
import contextvars
import dataclasses
import html
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.stages import TRAININGS, stage_name
from nemo_minitron.errors import MinitronError
from nemo_minitron.report.collect import lines_of
from nemo_minitron.report.figures import LOSSES, loss_names, losses
from nemo_minitron.report.stages import TENSORBOARD, finished_stages, number, unfinished_stages
from nemo_minitron.report.style import LIGHT, svg
from nemo_minitron.report.text import duration

TAIL = 20


class Events:
    """The losses in a TensorBoard folder, read on from where the last look ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.loaders: dict[Path, Any] = {}
        self.lines: dict[str, dict[int, dict[str, float]]] = {"train": {}, "validation": {}}

    def look(self) -> dict[str, Any]:
        """All losses so far: ``train`` and ``validation``, as in a manifest."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for path in sorted(self.folder.glob("events.out.tfevents.*")):
            if path not in self.loaders:
                self.loaders[path] = LegacyEventFileLoader(str(path))
            for event in self.loaders[path].Load():
                self._take(event)
        history = {split: lines_of([steps[step] for step in sorted(steps)]) for split, steps in self.lines.items()}
        return {**history, "result_step": None}

    def _take(self, event: Any) -> None:
        if event.HasField("session_log") and event.step:  # resumed: what came after that step is done again
            self.lines = {split: {step: line for step, line in steps.items() if step <= event.step}
                          for split, steps in self.lines.items()}  # fmt: skip
        for value in event.summary.value:
            split, _, name = value.tag.partition("/")
            if split in self.lines:
                self.lines[split].setdefault(event.step, {"step": event.step})[name] = value.simple_value


@dataclasses.dataclass(kw_only=True)
class LiveStage:
    """A stage that works, or that has ended since the watch began.

    Attributes:
        step, steps: optimizer steps so far, and in all; None where it does not train or has not begun.
        history: losses so far.
        seconds: since it was first seen; of an ended one, all that it took.
    """

    stage: str
    folder: str
    step: float | None = None
    steps: float | None = None
    history: dict[str, Any] = dataclasses.field(default_factory=lambda: {"train": [], "validation": []})
    seconds: float = 0.0
    left: float | None = None
    ended: bool = False

    def line(self) -> str:
        """What there is to say of it, on one line."""
        parts = [f"{self.stage}: {'done, ' if self.ended else ''}{duration(self.seconds)}"]
        if self.step is not None:
            parts.append(f"step {self.step}" + (f" of {self.steps}" if self.steps else ""))
        for split in ("train", "validation"):
            parts += [f"{split} {LOSSES.get(name, name)} {value:.4f}" for name, value in self.newest(split).items()]
        if lines := [line for line in self.history["train"] if "tokens_per_second" in line]:
            parts.append(f"{lines[-1]['tokens_per_second']:.0f} tokens/s")
        if self.left is not None and not self.ended:
            parts.append(f"about {duration(self.left)} left")
        return ", ".join(parts)

    def newest(self, split: str) -> dict[str, float]:
        """The last value of each loss."""
        lines = self.history[split]
        return {name: [line[name] for line in lines if name in line][-1] for name in loss_names({split: lines})}


class Watch:
    """Looks at a run's folders; knows which stages ended since it began, and which work now."""

    def __init__(self, run: str | os.PathLike):
        self.place = Path(run)
        self.before = {folder: manifest.created for folder, manifest in finished_stages(self.place)}
        self.ended: dict[str, LiveStage] = {}
        self.events: dict[str, Events] = {}
        self.seen: dict[str, tuple[float, float | None]] = {}

    def look(self) -> tuple[list[LiveStage], list[LiveStage]]:
        """Stages that ended since the watch began, in order, and those that work."""
        for folder, manifest in finished_stages(self.place):
            if self.before.get(folder) != manifest.created and folder not in self.ended:
                self.ended[folder] = self._ended(folder, manifest)
        working = [self._working(told) for told in unfinished_stages(self.place)]
        return list(self.ended.values()), working

    def _ended(self, folder: str, manifest: Manifest) -> LiveStage:
        history = {split: lines_of(manifest.metrics.get(split)) for split in ("train", "validation")}
        steps = number(manifest.metrics.get("steps"))
        return LiveStage(
            stage=stage_name(folder, manifest.stage),
            folder=folder,
            step=steps,
            steps=steps,
            history={**history, "result_step": number(manifest.metrics.get("result_step"))},
            seconds=number(manifest.timings.get("total_seconds")) or 0.0,
            ended=True,
        )

    def _working(self, told: dict[str, Any]) -> LiveStage:
        events = self.events.setdefault(told["folder"], Events(Path(told["partial"]) / TENSORBOARD))
        history = events.look()
        steps = [line["step"] for line in history["train"]]
        trainer = told["config"].get("trainer")
        total = number(trainer.get("max_steps")) if isinstance(trainer, dict) and told["kind"] in TRAININGS else None
        step = int(steps[-1]) if steps else None
        began, first = self.seen.setdefault(told["folder"], (time.monotonic(), step))
        seconds = time.monotonic() - began
        done = (step or 0) - (first or 0)
        left = seconds / done * (total - (step or 0)) if total and done > 0 else None
        return LiveStage(
            stage=told["stage"],
            folder=told["folder"],
            step=step,
            steps=total,
            history=history,
            seconds=seconds,
            left=left,
        )


class View(Protocol):
    """Shows what a watch sees."""

    def show(self, ended: Sequence[LiveStage], working: Sequence[LiveStage]) -> None:
        """Stages that ended since the watch began, in order, and those that work."""


class Notebook:
    """Draws a watch into a notebook's cell, over what it drew before."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self.html, self.last = HTML, ""
        self.handle = display(HTML(""), display_id=True)
        self.curve: tuple[object, str] = (None, "")

    def show(self, ended: Sequence[LiveStage], working: Sequence[LiveStage]) -> None:
        text = self.page(ended, working)
        if text != self.last:
            self.last = text
            self.handle.update(self.html(text))

    def page(self, ended: Sequence[LiveStage], working: Sequence[LiveStage]) -> str:
        """Lines of what ended, bars of what works, and the curve of the newest training."""
        rows = [f"<div>{html.escape(work.line())}</div>" for work in ended]
        for work in working:
            known = f' value="{work.step or 0}" max="{work.steps}"' if work.steps else ""
            rows.append(f'<div><progress style="width:16em"{known}></progress> {html.escape(work.line())}</div>')
        trained = [work for work in (*ended, *working) if work.history["train"] or work.history["validation"]]
        return "".join(rows) + (self._curve(trained[-1]) if trained else "")

    def _curve(self, work: LiveStage) -> str:
        key = (work.folder, work.ended, len(work.history["train"]), len(work.history["validation"]))
        if key != self.curve[0]:
            image = base64.b64encode(svg(losses(work.history, work.stage, theme=LIGHT)).encode("utf-8")).decode("ascii")
            alt = html.escape(work.line(), quote=True)
            self.curve = (key, f'<img style="max-width:480px" alt="{alt}" src="data:image/svg+xml;base64,{image}">')
        return self.curve[1]


class Terminal:
    """Prints a line for each validation and for each stage that ended."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.said: set[tuple[object, ...]] = set()

    def show(self, ended: Sequence[LiveStage], working: Sequence[LiveStage]) -> None:
        for work in working:
            validations = work.history["validation"]
            if validations:
                self._say((work.folder, "validation", validations[-1]["step"]), work.line())
        for work in ended:
            self._say((work.folder, "ended"), work.line())

    def _say(self, key: tuple[object, ...], line: str) -> None:
        if key not in self.said:
            self.said.add(key)
            print(line, file=self.stream, flush=True)


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return getattr(running, "kernel", None) is not None


@contextlib.contextmanager
def watching(run: str | os.PathLike, *, every: float = 2.0, view: View | None = None) -> Iterator[Watch]:
    """Shows what happens in `run` while the body works in this process.

    Args:
        run: a flow's output_dir, or the output of one stage; it need not be there yet.
        every: seconds between two looks.
        view: Notebook or Terminal; none: what this is.
    """
    watch = Watch(run)
    view = view or (Notebook() if in_notebook() else Terminal())
    stop = threading.Event()

    def keep_looking() -> None:
        while not stop.wait(every):
            _show(watch, view)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(keep_looking,), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()
        _show(watch, view)


def _show(watch: Watch, view: View) -> None:
    with contextlib.suppress(OSError):  # a folder that was renamed between two looks
        view.show(*watch.look())


def run_command(
    arguments: Sequence[str], run: str | os.PathLike, *, every: float = 2.0, view: View | None = None
) -> str:
    """Runs `minitron ARGUMENTS` in a process of its own and shows `run` while it works; returns what it printed.

    Interrupting the cell interrupts the command; a training goes on from its last validation when it is run again.

    Raises:
        MinitronError: the command failed; with what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "nemo_minitron", *map(str, arguments)]
        child = subprocess.Popen(command, stdout=out, stderr=said, start_new_session=True)
        try:
            with watching(run, every=every, view=view):
                code = child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)
            child.wait()
            raise
        out.seek(0)
        said.seek(0)
        if code:
            tail = "\n".join(said.read().strip().splitlines()[-TAIL:])
            raise MinitronError(f"minitron {' '.join(map(str, arguments))} ended with exit code {code}:\n{tail}")
        return out.read()
