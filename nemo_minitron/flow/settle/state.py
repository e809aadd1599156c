"""A flow's configuration on its way to being settled: what is given, what was chosen, and what the hardware is."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import MinitronError
from nemo_minitron.flow.models import chosen, student_architecture
from nemo_minitron.megatron.layout import Layout, transformer_engine_runs
from nemo_minitron.planning.layouts import Models
from nemo_minitron.planning.machine import USABLE, Machine, assumed_tflops, this_machine
from nemo_minitron.planning.run import Run

#: Where a run keeps what was chosen for it.
CHOSEN = "chosen.json"
#: A CPU's sequence: attention there works out all s x s scores, and few steps of many short samples teach more than
#: fewer of long ones.
CPU_SEQUENCE, GPU_SEQUENCE = 512, 8192
RECIPE = ("max_steps", "global_batch_size", "warmup_steps", "val_check_interval", "limit_val_batches")
#: Settings that may be left open, in the order in which they are chosen.
OPEN = (
    "hardware.devices", "hardware.tensor_model_parallel_size", "hardware.pipeline_model_parallel_size",
    "hardware.prune_pipeline_model_parallel_size", "model.seq_length", "hardware.micro_batch_size",
    *(f"{recipe}.{name}" for recipe in ("pretrain", "finetune", "distill", "instruct") for name in RECIPE),
    "limit_test_batches", "prune.batch_size", "prune.num_samples", "prune.num_block_samples",
)  # fmt: skip


class Choice(NamedTuple):
    """A setting that was open, what it became, and why."""

    setting: str
    value: int | str
    why: str


class State:
    """A configuration whose open settings are being chosen.

    Attributes:
        config: a copy, which changes.
        choices: what was chosen so far, in order.
        teacher: its sizes, once they are known.
        kept: setting -> what was chosen for this run before.
    """

    def __init__(self, config: c.FlowConfig, machine: Machine | None):
        self.config = copy.deepcopy(config)
        self.choices: list[Choice] = []
        self._teacher: Architecture | None = None
        self._machine = machine
        self.kept = {} if config.overwrite else read_kept(Path(config.output_dir) / CHOSEN)
        for setting in OPEN:
            if setting in self.kept:
                self.choose(setting, self.kept[setting], f"as this run was begun ({CHOSEN})")
        self.insists = None not in (self.config.model.seq_length, self.config.hardware.micro_batch_size)

    @property
    def teacher(self) -> Architecture:
        return chosen(self._teacher)

    @teacher.setter
    def teacher(self, sizes: Architecture) -> None:
        self._teacher = sizes

    @property
    def machine(self) -> Machine:
        if self._machine is None:
            self._machine = this_machine(self.config.hardware.accelerator)
        return self._machine

    def get(self, setting: str) -> Any:
        value: Any = self.config
        for name in setting.split("."):
            value = getattr(value, name)
        return value

    def choose(self, setting: str, value: int | str, why: str) -> None:
        """Settles `setting`, unless it is given."""
        if self.get(setting) is None:
            group, _, name = setting.rpartition(".")
            setattr(self.get(group) if group else self.config, name, value)
            self.choices.append(Choice(setting, value, why))

    def used(self) -> list[str]:
        """The recipes that this flow runs."""
        return [
            *(["pretrain"] if self.config.model.init == "random" else []),
            "finetune",
            "distill",
            *(["instruct"] if self.config.instruct.data else []),
        ]

    def is_open(self) -> bool:
        unused = tuple(f"{name}." for name in ("pretrain", "instruct") if name not in self.used())
        return any(self.get(setting) is None for setting in OPEN if not setting.startswith(unused))

    def cuda(self) -> bool:
        accelerator = self.config.hardware.accelerator
        return accelerator == "gpu" or (accelerator == "auto" and self.machine.gpus > 0)

    def limit(self) -> tuple[float | None, str]:
        """Bytes that a rank may take, and whose they are."""
        hardware = self.config.hardware
        if self.insists:
            return None, "as it is given"
        if hardware.rank_bytes is not None:
            return hardware.rank_bytes, f"{hardware.memory_gb:g} GB a rank (hardware.memory_gb)"
        if self.cuda() and not self.machine.gpus:
            return None, "memory that is not known (hardware.memory_gb)"
        memory = self.machine.rank_bytes
        if memory is None:
            return None, "memory that is not known (hardware.memory_gb)"
        if self.cuda():
            return memory, f"{memory / 1e9:.1f} GB, {USABLE:.0%} of a GPU's"
        memory /= chosen(hardware.devices)
        return memory, f"{memory / 1e9:.1f} GB a process, {USABLE:.0%} of what is free here"

    def run(self) -> Run:
        """The run as far as it is settled, with micro batch 1 where that is open."""
        hardware, cuda = self.config.hardware, self.cuda()
        micro, ranks = hardware.micro_batch_size or 1, (hardware.devices or 1) * hardware.num_nodes
        layout = Layout(**hardware.layout(cuda), micro_batch_size=micro, global_batch_size=micro * ranks)
        engine = transformer_engine_runs(cuda) if self.machine.gpus or not cuda else True
        form = self.config.distill.kd.form
        return Run(
            layout=layout,
            seq_length=self.config.model.seq_length or self.longest(),
            transformer_engine=engine,
            fused_loss=form == "fused" or (form == "auto" and not layout.sequence_parallel),
            threads=max(1, self.machine.cores // layout.devices),
            device_bytes=self.limit()[0],
        )

    def longest(self) -> int:
        cap = GPU_SEQUENCE if self.cuda() else CPU_SEQUENCE
        return min(cap, self.teacher.seq_length)

    def shapes(self) -> list[Architecture]:
        """Every student's sizes."""
        return [student_architecture(self.config, self.teacher, name) for name in self.config.prune.students]

    def models(self) -> Models:
        """The teacher, and its largest student."""
        return Models(teacher=self.teacher, student=max(self.shapes(), key=lambda one: one.parameters()))

    def rate(self) -> tuple[float, str]:
        """FLOP/s of all ranks, and where that comes from."""
        hardware = self.config.hardware
        ranks = (hardware.devices or 1) * hardware.num_nodes
        if hardware.tflops is not None:
            return 1e12 * hardware.tflops * ranks, "hardware.tflops"
        tflops, why = assumed_tflops(self.machine, self.cuda(), ranks)
        return 1e12 * tflops, why

    def operations(self, share: float) -> float:
        """Operations that a share of the flow's minutes is enough for."""
        return share * 60 * self.config.minutes * self.rate()[0]


def read_kept(place: Path) -> dict[str, int]:
    """Setting -> what was chosen for the run whose file `place` is; empty where there is none.

    Raises:
        MinitronError: it is not what a flow writes.
    """
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise MinitronError(f"{place} cannot be read ({error}): remove it, and the flow chooses anew") from None
    if not isinstance(kept, dict) or not all(
        name in OPEN and type(value) is int and value > 0 for name, value in kept.items()
    ):
        raise MinitronError(f"{place} is not what a flow writes: remove it, and the flow chooses anew")
    return kept
