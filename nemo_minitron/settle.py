"""What a flow's configuration leaves open (null, or a share) becomes a number, each with its reason.

Shares become the nearest shape on the pruning grid. Ranks, layout, sequence length and micro batch are what fits the
machine's memory by the plan's arithmetic. Steps and samples are what there is time for: `minutes`, of which TRAINING go
to the trainings, TESTING to the evaluations and SCORING to calibration, at the rate of planning.machine.

What was chosen for a run is kept in its folder, so that the same command goes on with it when the machine has more or
less to spare than before; what is given wins.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, PruningGrid, human, natural_divisor
from nemo_minitron.artifacts import write_json
from nemo_minitron.errors import ConfigError, DataError, EngineError, MinitronError
from nemo_minitron.planning.fitting import best_layout, fits, lengths, peak, with_batch
from nemo_minitron.planning.flops import forward_flops, scan_flops, stage_flops, training_flops
from nemo_minitron.planning.layouts import Candidate, Models
from nemo_minitron.planning.machine import Machine, assumed_tflops, this_machine
from nemo_minitron.planning.pace import Pace, Work
from nemo_minitron.planning.run import Run
from nemo_minitron.pruning.shares import SHARES, share_problems, sizes_of
from nemo_minitron.recipes import check_students, check_teacher, student_architecture, teacher_architecture
from nemo_minitron.runtime.layout import Layout, transformer_engine_runs
from nemo_minitron.workload import flow_work, text_bytes

#: Where a run keeps what was chosen for it.
CHOSEN = "chosen.json"
#: Of the flow's minutes.
TRAINING, TESTING, SCORING = 0.65, 0.2, 0.15
#: A CPU's sequence: attention there works out all s x s scores, and few steps of many short samples teach more than
#: fewer of long ones.
CPU_SEQUENCE, GPU_SEQUENCE = 512, 8192
#: More tokens in a micro batch make a CPU no faster.
CPU_TOKENS = 2048
#: Steps: at least LEAST_STEPS; beyond AIMED_STEPS the batch grows, up to that of NVIDIA's tutorial.
LEAST_STEPS, AIMED_STEPS, LEAST_BATCH, MOST_BATCH = 21, 60, 4, 128
#: A text may be read so often before more steps bring little (arXiv 2305.16264).
EPOCHS = 4
#: Bytes of English a token of a real model's tokenizer.
TOKEN_BYTES = 4.0
VALIDATIONS = 3
#: Tokens of a split that is tested, of the calibration, and samples of the scan of blocks.
TESTED, CALIBRATED, SCANNED = (2**14, 2**18), (2**15, 1024), (16, 256)
#: Samples a forward pass while scoring.
SCORING_BATCH = 16


class Choice(NamedTuple):
    """A setting that was open, what it became, and why."""

    setting: str
    value: Any
    why: str


@dataclasses.dataclass(frozen=True)
class Settled:
    """A flow's configuration with nothing left open.

    Attributes:
        teacher: its sizes.
        choices: what was chosen, in order.
        pace: how fast it is assumed to go.
        work: step -> its work.
    """

    config: c.FlowConfig
    teacher: Architecture
    choices: list[Choice]
    pace: Pace
    work: dict[str, Work]

    def keep(self) -> None:
        """Writes what was chosen to the run's folder.

        Raises:
            MinitronError: it cannot be written.
        """
        kept = {choice.setting: choice.value for choice in self.choices if choice.setting in OPEN}
        if not kept:
            return
        place = Path(self.config.output_dir) / CHOSEN
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, kept)
        except OSError as error:
            raise MinitronError(f"{place} cannot be written: {error.strerror}; give another output_dir") from None


RECIPE = ("max_steps", "global_batch_size", "warmup_steps", "val_check_interval", "limit_val_batches")
#: Settings that may be left open, in the order in which they are chosen.
OPEN = (
    "hardware.devices", "hardware.tensor_model_parallel_size", "hardware.pipeline_model_parallel_size",
    "hardware.prune_pipeline_model_parallel_size", "model.seq_length", "hardware.micro_batch_size",
    *(f"{recipe}.{name}" for recipe in ("pretrain", "finetune", "distill", "instruct") for name in RECIPE),
    "limit_test_batches", "prune.batch_size", "prune.num_samples", "prune.num_block_samples",
)  # fmt: skip


def settle(config: c.FlowConfig, machine: Machine | None = None) -> Settled:
    """The configuration with what it leaves open chosen; one that leaves nothing open stays as it is.

    Args:
        machine: none: this one.

    Raises:
        ConfigError: shares or targets that are wrong for this teacher.
        CheckpointError, DataError: the teacher or the text that the choice depends on is not there.
        EngineError: nothing fits.
    """
    settling = _Settling(copy.deepcopy(config), machine)
    if settling.is_open():
        settling.check_inputs()
    settling.teacher = teacher_architecture(config)
    settling.students()
    check_students(settling.config, settling.teacher)
    if settling.is_open():
        settling.hardware()
        settling.fit()
        settling.recipes()
        settling.tests()
        settling.calibration()
    settling.check_batches()
    work = flow_work(settling.config, settling.teacher, settling.run().local_spec)
    return Settled(settling.config, settling.teacher, settling.choices, settling.pace(), work)


class _Settling:
    """A configuration on its way to being settled."""

    def __init__(self, config: c.FlowConfig, machine: Machine | None):
        self.config, self.choices = config, []
        self.teacher: Architecture | None = None
        self._machine = machine
        self.insists = None not in (config.model.seq_length, config.hardware.micro_batch_size)
        self.kept = {} if config.overwrite else read_kept(Path(config.output_dir) / CHOSEN)

    @property
    def machine(self) -> Machine:
        if self._machine is None:
            self._machine = this_machine(self.config.hardware.accelerator)
        return self._machine

    def get(self, setting: str) -> Any:
        value = self.config
        for name in setting.split("."):
            value = getattr(value, name)
        return value

    def choose(self, setting: str, value: Any, why: str) -> None:
        """Settles `setting`, unless it is given; as the run has it, where it has been begun."""
        if self.get(setting) is not None:
            return
        if setting in self.kept:
            value, why = self.kept[setting], f"as this run was begun ({CHOSEN})"
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

    def check_inputs(self) -> None:
        check_teacher(self.config)
        source = self.config.data.source
        if text_bytes(self.config.data) is None:
            raise DataError(f"data.source = {source} does not exist: name a file or a folder of text")

    def check_batches(self) -> None:
        """Raises one ConfigError with every recipe whose samples cannot be shared out."""
        run = self.run()
        micro, ranks = run.layout.micro_batch_size, run.data_parallel
        found = [
            f"{name}.global_batch_size {getattr(self.config, name).global_batch_size} must be a multiple of "
            f"hardware.micro_batch_size {micro} x data parallel {ranks} = {micro * ranks}"
            for name in self.used()
            if ranks and getattr(self.config, name).global_batch_size % (micro * ranks)
        ]
        if found:
            raise ConfigError(found, "flow")

    # students

    def students(self) -> None:
        """Every share becomes sizes; raises ConfigError with what is wrong with any."""
        prune, found = self.config.prune, []
        for name, targets in prune.students.items():
            problems = share_problems(targets or {})
            found += [f"prune.students.{name}.{problem}" for problem in problems]
            if not problems and any((targets or {}).get(share) is not None for share in SHARES):
                prune.students[name] = self.sizes(name, targets)
        if found:
            raise ConfigError(found, "flow")

    def sizes(self, name: str, targets: dict[str, Any]) -> dict[str, Any]:
        prune, teacher = self.config.prune, self.teacher
        without = {key: value for key, value in targets.items() if key not in SHARES}
        if any(without.get(key) is not None for key in ("num_layers", "drop_layers", "num_attention_heads")):
            check_students(_with_students(self.config, {name: without}), teacher)
        widths = {"hidden_size": prune.hidden_size_divisor, "ffn_hidden_size": prune.ffn_hidden_size_divisor}
        if targets.get("parameters") is not None:
            for size, given in widths.items():
                self.divisor(size, given)
        grid = PruningGrid(**widths, num_layers=prune.num_layers_divisor)
        found = sizes_of({"method": prune.method} | targets, teacher, grid)
        found = {key: value for key, value in found.items() if key in targets or key not in ("method",)}
        shape = teacher.with_sizes(
            **{key: found.get(key) for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")}
        )
        asked = " and ".join(f"{targets[share]} of the {share}" for share in SHARES if targets.get(share) is not None)
        sizes = ", ".join(f"{key} {value}" for key, value in found.items() if key not in without)
        share = shape.parameters() / teacher.parameters()
        why = f"{asked}, the nearest on the grid; {share:.1%} of the parameters, {human(shape.parameters())}"
        self.choices.append(Choice(f"prune.students.{name}", sizes, why))
        return found

    def divisor(self, size: str, given: int | None) -> None:
        """Says which grid holds, once."""
        setting, own = f"prune.{size}_divisor", getattr(self.teacher, size)
        if given is None and setting not in [choice.setting for choice in self.choices]:
            value = natural_divisor(size, own)
            why = f"the teacher's {own} in steps: the largest power of two that makes 12 of them, up to ModelOpt's"
            self.choices.append(Choice(setting, value, why))

    # hardware

    def cuda(self) -> bool:
        accelerator = self.config.hardware.accelerator
        return accelerator == "gpu" or (accelerator == "auto" and self.machine.gpus > 0)

    def hardware(self) -> None:
        gpus, cores = self.machine.gpus, self.machine.cores
        if self.cuda():
            self.choose("hardware.devices", gpus or 1, f"the GPUs of this machine, {gpus}")
        else:
            self.choose("hardware.devices", 1, f"no GPU here; one process on {cores} core{'s' if cores > 1 else ''}")

    def limit(self) -> tuple[float | None, str]:
        """Bytes that a rank may take, and whose they are."""
        hardware = self.config.hardware
        if self.insists:
            return None, "as it is given"
        if hardware.memory_gb is not None:
            return hardware.memory_gb * 1e9, f"{hardware.memory_gb:g} GB a rank (hardware.memory_gb)"
        if self.cuda() and not self.machine.gpus:
            return None, "memory that is not known (hardware.memory_gb)"
        memory = self.machine.rank_bytes
        if memory is None:
            return None, "memory that is not known (hardware.memory_gb)"
        if self.cuda():
            return memory, f"{memory / 1e9:.1f} GB, 75% of a GPU's"
        memory /= hardware.devices
        return memory, f"{memory / 1e9:.1f} GB a process, 75% of what is free here"

    def run(self) -> Run:
        """The run as far as it is settled, with micro batch 1 where that is open."""
        hardware, cuda = self.config.hardware, self.cuda()
        micro = hardware.micro_batch_size or 1
        tensor, pipeline = hardware.tensor_model_parallel_size or 1, hardware.pipeline_model_parallel_size or 1
        devices = hardware.devices or 1
        layout = Layout(
            cuda=cuda,
            bf16=hardware.precision.startswith("bf16") or (hardware.precision == "auto" and cuda),
            devices=devices,
            num_nodes=hardware.num_nodes,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            sequence_parallel=hardware.sequence_parallel and tensor > 1,
            micro_batch_size=micro,
            global_batch_size=micro * devices * hardware.num_nodes,
        )
        engine = transformer_engine_runs(cuda) if self.machine.gpus or not cuda else True
        form = self.config.distill.kd.form
        return Run(
            layout=layout,
            seq_length=self.config.model.seq_length or self.longest(),
            transformer_engine=engine,
            fused_loss=form == "fused" or (form == "auto" and not layout.sequence_parallel),
            threads=max(1, self.machine.cores // devices),
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

    def fit(self) -> None:
        """Layout, sequence and scoring ranks that fit; the micro batch waits for the global batch."""
        limit, whose = self.limit()
        models, run = self.models(), self.run()
        given = self.config.model.seq_length
        tried = [given] if given else list(lengths(self.longest()))
        for length in tried:
            run = with_batch(run, seq_length=length)
            found, scoring = self.layout(models, run, limit)
            if scoring:
                break
        else:
            raise EngineError(self.nothing_fits(models, run, found, whose))
        run = found.run
        why = "as few ranks as hold a replica"
        self.choose("hardware.tensor_model_parallel_size", run.layout.tensor_parallel, why)
        self.choose("hardware.pipeline_model_parallel_size", run.layout.pipeline_parallel, why)
        self.choose("hardware.prune_pipeline_model_parallel_size", scoring, "as few ranks as hold the teacher")
        if length == self.longest():
            most = (
                "the teacher's own"
                if length == self.teacher.seq_length
                else f"of the teacher's {self.teacher.seq_length}"
            )
            why = f"{most}, as much as pays on a {'GPU' if self.cuda() else 'CPU'}; fits {whose}"
        else:
            why = f"the longest power of two that fits {whose}"
        self.choose("model.seq_length", length, why)

    def layout(self, models: Models, run: Run, limit: float | None) -> tuple[Candidate | None, int]:
        """The best layout, and the ranks that score; 0 where not all fits."""
        hardware = self.config.hardware
        fixed = {
            "tensor_parallel": hardware.tensor_model_parallel_size,
            "pipeline_parallel": hardware.pipeline_model_parallel_size,
        }
        found = best_layout(models, run, limit, {name: size for name, size in fixed.items() if size is not None})
        if found is None or found.problem is not None:
            return found, 0
        given, ranks = hardware.prune_pipeline_model_parallel_size, run.layout.world_size
        for scoring in [given] if given else range(1, min(ranks, self.teacher.num_layers) + 1):
            if fits(models, found.run, ("prune",), limit, (scoring, 1)):
                return found, scoring
        return found, 0

    def nothing_fits(self, models: Models, run: Run, found: Candidate | None, whose: str) -> str:
        """Why no sequence is short enough."""
        hardware = self.config.hardware
        ranks = f"{hardware.num_nodes} x {hardware.devices} rank(s)"
        if found is None or not found.possible:
            layout = run.layout
            what = found.problem if found else (
                f"{ranks} cannot be divided into tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel}"
            )  # fmt: skip
            return f"{what}; leave hardware.*_model_parallel_size open (null), or give sizes that divide the teacher"
        if found.problem:
            why = found.problem
        else:
            stage, total = peak(models, found.run, ("prune",))
            why = f"{stage} needs {total / 1e9:.1f} GB"
        return (
            f"nothing fits {whose}: {why}, with sequences of {run.seq_length} and micro batch "
            f"{run.layout.micro_batch_size} on {ranks}; take more or larger hardware (hardware=PRESET) or smaller "
            "students, or insist: give both model.seq_length and hardware.micro_batch_size"
        )

    # time

    def rate(self) -> tuple[float, str]:
        """FLOP/s of all ranks, and where that comes from."""
        hardware = self.config.hardware
        ranks = (hardware.devices or 1) * hardware.num_nodes
        if hardware.tflops is not None:
            return 1e12 * hardware.tflops * ranks, "hardware.tflops"
        tflops, why = assumed_tflops(self.machine, self.cuda(), ranks)
        return 1e12 * tflops, why

    def pace(self) -> Pace:
        flops, why = self.rate()
        return Pace(flops, why, self.config.data.workers)

    def operations(self, share: float) -> float:
        """Operations that a share of the flow's minutes is enough for."""
        return share * 60 * self.config.minutes * self.rate()[0]

    def trainings(self) -> dict[str, float]:
        """Recipe -> operations of a token in all its trainings together."""
        config, length, whole = self.config, self.config.model.seq_length, self.run().local_spec
        teacher = forward_flops(self.teacher, length, whole_scores=whole)
        each = [training_flops(student, length, whole_scores=whole) for student in self.shapes()]
        with_teacher = teacher if config.distill.kd.kd_weight else 0.0
        found = {"pretrain": 3 * teacher, "finetune": 3 * teacher, "instruct": sum(each)}
        found["distill"] = sum(each) * (2 if config.distill.control else 1) + with_teacher * len(each)
        return {name: found[name] for name in self.used()}

    def recipes(self) -> None:
        """Batches, steps and validations: each training sees as many tokens."""
        length, each = self.config.model.seq_length, self.run().data_parallel
        each *= self.config.hardware.micro_batch_size or 1
        tokens, bound = self.tokens()
        batch = each * _power_of_two(tokens / (AIMED_STEPS * length * each), LEAST_BATCH / each, MOST_BATCH / each)
        for name in self.used():
            times = f"{each} times " if each > 1 else ""
            why = f"{times}a power of two for {AIMED_STEPS} steps or more, {LEAST_BATCH} to {MOST_BATCH}"
            self.choose(f"{name}.global_batch_size", batch, why)
        self.micro_batch()
        for name in self.used():
            recipe = getattr(self.config, name)
            steps = int(tokens / (recipe.global_batch_size * length)) // VALIDATIONS * VALIDATIONS
            why = bound if steps >= LEAST_STEPS else f"the least that is offered; {bound} would be {steps}"
            self.choose(f"{name}.max_steps", max(steps, LEAST_STEPS), why)
            self.choose(f"{name}.warmup_steps", max(1, recipe.max_steps // 10), "a tenth of the steps")
            self.choose(
                f"{name}.val_check_interval", _interval(recipe.max_steps), f"{VALIDATIONS} times, also at the end"
            )
            most = min(max(2, recipe.max_steps // 10), 32)
            self.choose(f"{name}.limit_val_batches", most, "a tenth of the training's arithmetic, 2 to 32")

    def tokens(self) -> tuple[float, str]:
        """Tokens of each training whose steps are open, and what bounds them."""
        length, each = self.config.model.seq_length, self.trainings()
        left = self.operations(TRAINING)
        for name, flops in each.items():
            recipe = getattr(self.config, name)
            if recipe.max_steps is not None:
                left -= recipe.max_steps * (recipe.global_batch_size or MOST_BATCH) * length * flops
        flops = sum(value for name, value in each.items() if getattr(self.config, name).max_steps is None)
        tokens = max(left, 0.0) / flops if flops else 0.0
        read = EPOCHS * (text_bytes(self.config.data) or math.inf) / TOKEN_BYTES
        rate, why = self.rate()
        if read < tokens:
            return read, f"the text {EPOCHS} times over, about {human(read)} tokens"
        minutes = f"{TRAINING:.0%} of {self.config.minutes:g} minutes"
        return tokens, f"{minutes}, {human(tokens)} tokens a training at {rate / 1e12:.3g} TFLOP/s ({why})"

    def micro_batch(self) -> None:
        """The largest power of two that divides every global batch and fits."""
        (limit, whose), models, run = self.limit(), self.models(), self.run()
        samples = math.gcd(*(getattr(self.config, name).global_batch_size for name in self.used()))
        size, why = 1, f"the most that fit {whose}"
        while samples % (2 * size * run.data_parallel) == 0:
            larger = with_batch(run, micro_batch=2 * size)
            if not fits(models, larger, ("finetune", "distill"), limit):
                break
            if not self.cuda() and larger.tokens > CPU_TOKENS:
                why = f"{CPU_TOKENS} tokens: more make a CPU no faster; fits {whose}"
                break
            size *= 2
        else:
            why = f"all samples of a step; fits {whose}"
        self.choose("hardware.micro_batch_size", size, why)

    def tests(self) -> None:
        """Batches of an evaluation: every model, two splits."""
        length, whole = self.config.model.seq_length, self.run().local_spec
        models = [self.teacher] * 2 + self.shapes() * (3 if self.config.distill.control else 2)
        each = 2 * sum(forward_flops(model, length, whole_scores=whole) for model in models)
        tokens = min(max(self.operations(TESTING) / each, TESTED[0]), TESTED[1])
        batches = max(1, int(tokens / (self.config.distill.global_batch_size * length)))
        why = (
            f"{TESTING:.0%} of {self.config.minutes:g} minutes for {len(models)} evaluations, 2^14 to 2^18 tokens each"
        )
        self.choose("limit_test_batches", batches, why)

    def calibration(self) -> None:
        """Samples of scoring and of the scan of blocks, and how many go at once."""
        (limit, whose), length, run = self.limit(), self.config.model.seq_length, self.run()
        scoring, size = self.config.hardware.prune_pipeline_model_parallel_size, 1
        while size < SCORING_BATCH and (self.cuda() or 2 * size * length <= CPU_TOKENS):
            if not fits(self.models(), run, ("prune",), limit, (scoring, 2 * size)):
                break
            size *= 2
        most = "2048 tokens" if not self.cuda() else f"{SCORING_BATCH}"
        self.choose("prune.batch_size", size, f"as many as fit {whose}, up to {most}")
        each = stage_flops("prune", self.teacher, None, length, whole_scores=True)
        samples = int(self.operations(SCORING * 2 / 3) / (each * length))
        least = -(-CALIBRATED[0] // length)
        why = f"{SCORING * 2 / 3:.0%} of {self.config.minutes:g} minutes, between 2^15 tokens and 1024 samples"
        self.choose("prune.num_samples", min(max(samples, least), max(CALIBRATED[1], least)), why)
        layers = [self.teacher.num_layers - student.num_layers for student in self.shapes()]
        every = self.config.prune.depth_by == "block_loss"
        each = sum(
            scan_flops(self.teacher, dropped, self.teacher.num_layers - dropped + 1 if every else dropped, length,
                       every_block=every)
            for dropped in layers if dropped
        )  # fmt: skip
        ranks = 4 * self.config.hardware.devices * self.config.hardware.num_nodes
        samples = int(self.operations(SCORING / 3) / (each * length)) if each else SCANNED[0]
        samples = min(max(samples, SCANNED[0]), SCANNED[1])
        why = f"{SCORING / 3:.0%} of {self.config.minutes:g} minutes, {SCANNED[0]} to {SCANNED[1]}"
        self.choose("prune.num_block_samples", max(ranks, samples // ranks * ranks), why)


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


def _with_students(config: c.FlowConfig, students: dict[str, dict[str, Any]]) -> c.FlowConfig:
    return dataclasses.replace(config, prune=dataclasses.replace(config.prune, students=students))


def _power_of_two(value: float, least: float, most: float) -> int:
    """The largest power of two up to `value`, within bounds, at least 1."""
    bounded = min(max(value, least, 1.0), max(most, 1.0))
    return 1 << int(math.log2(bounded))


def _interval(steps: int) -> int:
    """The least interval that validates no more often than VALIDATIONS times, and after the last step."""
    return next(every for every in range(max(1, -(-steps // VALIDATIONS)), steps + 1) if steps % every == 0)
