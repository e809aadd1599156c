"""The map: every stage of the way from a teacher to its students, in order.

data -> teacher -> teacher correction -> importance -> prune -> distil, with a control beside it -> table

Where there are instructions, the distilled students are tuned on them at the end.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import MANIFEST, Manifest, versions, write_json
from nemo_minitron.errors import MinitronError
from nemo_minitron.flow.configs import (
    check_instructions,
    check_teacher,
    instruct_config,
    pretrains_on_broad,
    prune_config,
    student_targets,
    teachers,
    training_fields,
)
from nemo_minitron.flow.dry_run import describe
from nemo_minitron.flow.settle import Settled, settle
from nemo_minitron.packages.versions import check_training
from nemo_minitron.planning.machine import this_machine
from nemo_minitron.planning.pace import in_words, measured_flops
from nemo_minitron.report.collect import collect
from nemo_minitron.report.command import check_free, write_run
from nemo_minitron.report.stages import PAGE, REPORT

FACTS = "evaluate facts"


class Step(NamedTuple):
    """One stage of a flow: what it is called, the folder it makes, and the call that makes it."""

    name: str
    output: Path
    run: Callable[[], Manifest]


def prune(config: c.PruneConfig) -> Manifest | None:
    """`minitron prune`: checks everything, runs the teacher where the cut needs it, then cuts.

    As one rank of several, started by torchrun or the like, only rank 0 cuts.
    """
    from nemo_minitron.launch.ranks import rank
    from nemo_minitron.pruning import command as stage

    stage.check(config)
    folders = prerequisites(config)
    if rank() > 0:
        return None
    return stage.prune(config, *folders)


def prerequisites(config: c.PruneConfig) -> tuple[Path | None, Path | None, Path | None]:
    """The folders of scores, of the scan of blocks and of the refit, each made where it is needed and not there yet."""
    scores = scan = None
    if config.prune.needs_scores:
        from nemo_minitron.pruning.calibration import scores_folder
        from nemo_minitron.pruning.importance.scoring import score

        score(config)
        scores = scores_folder(config)
    if config.needs_scan:
        from nemo_minitron.pruning.importance import scan as scanning

        scanning.scan(config)
        scan = scanning.scan_folder(config)
    if not config.refits:
        return scores, scan, None
    from nemo_minitron.pruning import refit as refitting

    refitting.refit(config, scores, scan)
    return scores, scan, refitting.refit_folder(config)


def refit(config: c.PruneConfig) -> None:
    """What a rank of the refit runs."""
    prerequisites(config)


def run_flow(config: c.FlowConfig) -> Manifest | None:
    """`minitron flow`: runs every stage that is not done yet, then writes report.json and prints the table."""
    settled = settle(config)
    if config.dry_run:
        print(describe(settled))
        return None
    config = settled.config
    check_training("minitron flow")
    check_teacher(config)
    check_instructions(config)
    manifests = {}
    steps = plan_steps(config, settled.teacher)
    settled.keep()
    clock = Clock(settled, steps)
    for number, step in enumerate(steps, 1):
        manifests[step.name] = run_step(step, f"[{number}/{len(steps)}]", clock)
    show(config, finish(config, steps, manifests))
    draw(Path(config.output_dir))
    return None


def finish(config: c.FlowConfig, steps: list[Step], manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Writes report.json; returns what is in it.

    Args:
        steps: all steps of the flow.
        manifests: step's name -> manifest, of all steps.
    """
    report = summarize(config, manifests, {step.name: step.output for step in steps})
    write_json(Path(config.output_dir) / REPORT, report)
    return report


class Clock:
    """What the steps of a flow will take, from a measurement of a moment and then from those that ran.

    Attributes:
        work: step -> its work.
    """

    def __init__(self, settled: Settled, steps: list[Step]):
        self.work, self.pace = settled.work, settled.pace
        hardware = settled.config.hardware
        on_cpu = hardware.accelerator == "cpu" or (hardware.accelerator == "auto" and not this_machine().gpus)
        if on_cpu and hardware.tflops is None:
            self.pace.flops, self.pace.source = measured_flops(), "measured just now"
        ahead = [step for step in steps if not done(step)]
        total = sum(self.pace.seconds(self.work[step.name]) for step in ahead)
        rate = f"{self.pace.flops / 1e12:.3g} TFLOP/s, {self.pace.source}"
        finished = f", {len(steps) - len(ahead)} of them done before" if len(ahead) < len(steps) else ""
        print(f"{len(steps)} stages{finished}: {in_words(total)} in all ({rate})", file=sys.stderr, flush=True)

    def estimate(self, step: Step) -> str:
        """How long a step will take, in words; what is done already takes none."""
        return "done before" if done(step) else in_words(self.pace.seconds(self.work[step.name]))

    def learn(self, step: Step, manifest: Manifest) -> None:
        self.pace.learn(self.work[step.name], manifest.timings.get("total_seconds", 0.0))


def done(step: Step) -> bool:
    """Whether the step's folder holds a finished result; whether it is of this very step, the step itself checks."""
    return (step.output / MANIFEST).is_file()


def run_step(step: Step, position: str, clock: Clock) -> Manifest:
    """Runs one step with a line before and after it."""
    print(f"{position} {step.name} ... {clock.estimate(step)}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    manifest = step.run()
    seconds = time.perf_counter() - started
    clock.learn(step, manifest)
    print(f"{position} {step.name}: {seconds:.1f} s -> {step.output}", file=sys.stderr, flush=True)
    return manifest


def plan_steps(config: c.FlowConfig, teacher: Architecture) -> list[Step]:
    """Every stage in order."""
    run = Path(config.output_dir)
    steps = data_steps(config, run)
    steps += teacher_steps(config, run)
    steps += [evaluate_step(config, name, folder) for name, folder in teachers(config, run)]
    if any(student_targets(config, name).needs_scores for name in config.prune.students):
        steps.append(score_step(config, run))
    for name in config.prune.students:
        steps += student_steps(config, run, name)
    if config.instruct.data:
        steps += [instruct_step(config, run, name) for name in config.prune.students]
    return steps + facts_steps(config, run)


def data_steps(config: c.FlowConfig, run: Path) -> list[Step]:
    """The corpora: for a teacher made here on the embedded corpus, first the broad one it is pretrained on."""
    from nemo_minitron.data.command import prepare

    def step(name: str, folder: Path, **fields: Any) -> Step:
        data = c.DataConfig(
            output=str(folder),
            source=config.data.source,
            text_key=config.data.text_key,
            limit_documents=config.data.limit_documents,
            vocab_size=config.data.vocab_size,
            workers=config.data.workers,
            seed=config.seed,
            overwrite=config.overwrite,
            **fields,
        )
        return Step(name, folder, lambda: prepare(c.validated(data)))

    tokenizer = config.data.tokenizer
    steps = []
    if pretrains_on_broad(config):
        fields = {"domain": "broad", "words": config.data.pretrain_words, "tokenizer": tokenizer}
        steps.append(step("data (broad)", run / "data-broad", **fields))
        tokenizer = tokenizer or str(run / "data-broad" / "tokenizer")
    elif config.model.init == "checkpoint" and tokenizer is None:
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        tokenizer = open_checkpoint(config.model.restore_from_path, "teacher").tokenizer
    steps.append(step("data", run / "data", words=config.data.words, tokenizer=tokenizer))
    return steps


def teacher_steps(config: c.FlowConfig, run: Path) -> list[Step]:
    """Pretraining where the teacher is made here, then teacher correction on the flow's own text."""
    from nemo_minitron.training.finetune import finetune

    steps = []
    if config.model.init == "random":
        data = run / ("data-broad" if pretrains_on_broad(config) else "data")
        fields = training_fields(config, config.pretrain, data, run / "teacher-pretrained")
        fields["model"].init, fields["model"].architecture = "random", dict(config.model.architecture)
        pretrain = c.FinetuneConfig(**fields)
        steps.append(Step("pretrain teacher", run / "teacher-pretrained", lambda: finetune(c.validated(pretrain))))
    fields = training_fields(config, config.finetune, run / "data", run / "teacher")
    fields["model"].restore_from_path = str(teachers(config, run)[0][1])
    correct = c.FinetuneConfig(**fields)
    steps.append(Step("teacher correction", run / "teacher", lambda: finetune(c.validated(correct))))
    return steps


def score_step(config: c.FlowConfig, run: Path) -> Step:
    """One calibration pass for all students."""
    from nemo_minitron.pruning.importance.scoring import score

    scoring = prune_config(config, run, next(iter(config.prune.students)))
    return Step("importance", run / "scores", lambda: score(c.validated(scoring)))


def student_steps(config: c.FlowConfig, run: Path, name: str) -> list[Step]:
    """Prune, evaluate, distil, evaluate; and the control."""
    from nemo_minitron.distillation.command import distill
    from nemo_minitron.pruning.command import prune as cut
    from nemo_minitron.pruning.importance.scan import scan, scan_folder
    from nemo_minitron.pruning.refit import refit as fit
    from nemo_minitron.pruning.refit import refit_folder

    pruning = prune_config(config, run, name)
    pruned, scores = Path(pruning.export.save_path), run / "scores"
    blocks = scan_folder(pruning) if pruning.needs_scan else None
    fitted = refit_folder(pruning) if pruning.refits else None
    steps = []
    if pruning.needs_scan:
        steps.append(Step(f"scan blocks for {name}", blocks, lambda: scan(c.validated(pruning))))
    if pruning.refits:
        steps.append(Step(f"refit {name}", fitted, lambda: fit(c.validated(pruning), scores, blocks)))
    steps += [
        Step(f"prune {name}", pruned, lambda: cut(c.validated(pruning), scores, blocks, fitted)),
        evaluate_step(config, f"{name} pruned", pruned),
    ]
    runs = [("distilled", config.distill.kd)]
    if config.distill.control:
        runs.append(("control", c.KDConfig(kd_weight=0.0, lm_weight=1.0)))
    for kind, kd in runs:
        output = run / f"{name}-{kind}"
        fields = training_fields(config, config.distill, run / "data", output)
        fields["model"].restore_from_path = str(pruned)
        if kd.kd_weight:
            fields["model"].kd_teacher_restore_from_path = str(run / "teacher")
        training = c.DistillConfig(**fields, kd=kd)
        verb = "distil" if kd.kd_weight else "retrain (LM loss alone)"
        steps.append(Step(f"{verb} {name}", output, lambda training=training: distill(c.validated(training))))
        steps.append(evaluate_step(config, f"{name} {kind}", output))
    return steps


def instruct_step(config: c.FlowConfig, run: Path, name: str) -> Step:
    """Instruction tuning of a distilled student."""
    from nemo_minitron.training.finetune import finetune

    tuning = instruct_config(config, run, name)
    return Step(f"instruct {name}", Path(tuning.output), lambda: finetune(c.validated(tuning)))


def evaluate_step(config: c.FlowConfig, name: str, checkpoint: Path) -> Step:
    """Validation and test loss of one checkpoint on the flow's own text."""
    from nemo_minitron.evaluation.loss import evaluate_loss

    run = Path(config.output_dir)
    output = run / "evaluations" / name.replace(" ", "-")
    fields = training_fields(config, config.distill, run / "data", output)
    fields["model"].restore_from_path = str(checkpoint)
    fields["trainer"].max_steps = fields["trainer"].val_check_interval = 1
    evaluation = c.LossConfig(**fields, limit_batches=config.limit_test_batches)
    return Step(f"evaluate {name}", output, lambda: evaluate_loss(c.validated(evaluation)))


def facts_steps(config: c.FlowConfig, run: Path) -> list[Step]:
    """Where the text is the embedded corpus: which of its facts each model knows, the corrected teacher first."""
    if config.data.source != "embedded" or not config.facts:
        return []
    from nemo_minitron.evaluation.command import measure

    before, corrected = teachers(config, run)
    kinds = ("pruned", "distilled", "control") if config.distill.control else ("pruned", "distilled")
    students = [(f"{name} {kind}", run / f"{name}-{kind}") for name in config.prune.students for kind in kinds]
    models = [corrected, before, *students]
    output = run / "evaluations" / "facts"
    evaluation = c.EvaluateConfig(
        models=[str(folder) for _, folder in models],
        names=[name for name, _ in models],
        tasks=["facts"],
        corpus=str(run / "data"),
        device=config.hardware.device,
        tokenizer=str(run / "data" / "tokenizer"),
        limit=config.facts,
        seed=config.seed,
        output=str(output),
        overwrite=config.overwrite,
    )
    return [Step(FACTS, output, lambda: measure(c.validated(evaluation))[1])]


def summarize(config: c.FlowConfig, manifests: dict[str, Manifest], folders: dict[str, Path]) -> dict[str, Any]:
    """report.json: the table, each stage's time and memory, and how all of it was made."""
    from nemo_minitron.report.summary import environment
    from nemo_minitron.report.table import add_gaps, cut_of, row, verdicts

    def measured(name: str) -> dict[str, Any]:
        return manifests[f"evaluate {name}"].metrics

    rows = [
        row("teacher", measured("teacher"), kind="teacher"),
        row("teacher corrected", measured("teacher corrected"), kind="corrected"),
    ]
    for name in config.prune.students:
        kinds = [kind for kind in ("pruned", "distilled", "control") if f"evaluate {name} {kind}" in manifests]
        rows += [row(f"{name} {kind}", measured(f"{name} {kind}"), student=name, kind=kind) for kind in kinds]
    rows = add_gaps(rows)
    stages = [
        {
            "stage": name,
            "folder": folders[name].relative_to(config.output_dir).as_posix(),
            "seconds": manifest.timings.get("total_seconds", 0.0),
            "peak_memory_bytes": manifest.peak_memory_bytes,
        }
        for name, manifest in manifests.items()
    ]
    data = manifests["data"].metrics
    facts = {"facts": manifests[FACTS].metrics} if FACTS in manifests else {}
    return {
        "table": rows,
        "verdicts": verdicts(rows),
        "cuts": {name: cut_of(manifests[f"prune {name}"]) for name in config.prune.students},
        "instructed": {
            name: manifests[f"instruct {name}"].metrics["validation"]
            for name in config.prune.students
            if f"instruct {name}" in manifests
        },
        **facts,
        "stages": stages,
        "data": data,
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "environment": environment(),
        "seed": config.seed,
    }


def show(config: c.FlowConfig, report: dict[str, Any]) -> None:
    """Prints the tables of a report."""
    from nemo_minitron.report.table import legend, render_cuts, render_stages, render_table

    print()
    print(render_table(report["table"]))
    print()
    for cut in render_cuts(report["cuts"]):
        print(cut)
    print(legend(report["table"]))
    for verdict in report["verdicts"]:
        print(verdict)
    for name, validation in report["instructed"].items():
        losses = ", ".join(f"{entry['lm_loss']:.4f} (step {entry['step']})" for entry in validation)
        print(f"{name} instructed: loss of the answers in validation {losses}")
    print()
    if "facts" in report:
        from nemo_minitron.evaluation.results import render_facts

        print("\n".join([*render_facts(report["facts"]), ""]))
    print(render_stages(report["stages"]))
    print()
    print(f"report: {Path(config.output_dir) / REPORT}")


def draw(run: Path) -> None:
    """Writes the page of a run and prints where it is; without what draws it, says so: the run itself is done."""
    try:
        check_free(run / PAGE, overwrite=False)
        write_run(collect(run), run / PAGE)
    except MinitronError as error:
        print(f"no page: {error}; then `minitron report {run}`", file=sys.stderr)
    else:
        print(f"page: {run / PAGE}")
