"""`minitron flow`: every step that is not done yet, then the table, report.json and the page."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.flow.dry_run import describe
from nemo_minitron.flow.models import check_teacher
from nemo_minitron.flow.settle import Settled, settle, with_found
from nemo_minitron.flow.steps import Step, always, steps_to_run
from nemo_minitron.flow.summary import show, write_summary
from nemo_minitron.packages.versions import check_training
from nemo_minitron.planning.machine import this_machine
from nemo_minitron.planning.pace import Work, in_words, measured_flops
from nemo_minitron.report.command import draw


def run_flow(config: c.FlowConfig) -> None:
    """`minitron flow`: runs every stage that is not done yet, then writes report.json and prints the table."""
    settled = settle(config)
    if config.dry_run:
        print(describe(settled))
        return
    config = settled.config
    check_training("minitron flow")
    check_teacher(config)
    check_instructions(config)
    steps = steps_to_run(config)
    settled.keep()
    clock = Clock(settled, steps)
    results = run_steps(settled, lambda step, work, position: run_step(step, work, position, clock))
    show(config, write_summary(config, results))
    draw(Path(config.output_dir))


def run_steps(
    settled: Settled, run: Callable[[Step, Work, str], Manifest], wanted: Callable[[Step], bool] = always
) -> list[tuple[Step, Manifest]]:
    """Runs the steps of a flow that are wanted, in order; what follows a search is planned anew with what it found.

    Args:
        run: takes a step, its work, and `[number/steps]`.
    """
    results: list[tuple[Step, Manifest]] = []
    steps = [step for step in steps_to_run(settled.config) if wanted(step)]
    while len(results) < len(steps):
        step = steps[len(results)]
        position = f"[{len(results) + 1}/{len(steps)}]"
        results.append((step, run(step, settled.work[step.name], position)))
        if step.kind == "search":
            settled = with_found(settled)
            steps = [step for step in steps_to_run(settled.config) if wanted(step)]
    return results


def check_instructions(config: c.FlowConfig) -> None:
    """Reads the instructions, before any work, where there are any."""
    if config.instruct.data:
        from nemo_minitron.data.instructions import read_instructions

        read_instructions(config.instruct.data, config.instruct.rows, config.seed)


class Clock:
    """What the steps of a flow will take, from a measurement of a moment and then from those that ran."""

    def __init__(self, settled: Settled, steps: list[Step]):
        self.pace = settled.pace
        hardware = settled.config.hardware
        on_cpu = hardware.accelerator == "cpu" or (hardware.accelerator == "auto" and not this_machine().gpus)
        if on_cpu and hardware.tflops is None:
            self.pace.flops, self.pace.source = measured_flops(), "measured just now"
        ahead = [step for step in steps if not step.done]
        total = sum(self.pace.seconds(settled.work[step.name]) for step in ahead)
        rate = f"{self.pace.flops / 1e12:.3g} TFLOP/s, {self.pace.source}"
        finished = f", {len(steps) - len(ahead)} of them done before" if len(ahead) < len(steps) else ""
        print(f"{len(steps)} stages{finished}: {in_words(total)} in all ({rate})", file=sys.stderr, flush=True)

    def estimate(self, step: Step, work: Work) -> str:
        """How long a step will take, in words; what is done already takes none."""
        return "done before" if step.done else in_words(self.pace.seconds(work))

    def learn(self, work: Work, manifest: Manifest) -> None:
        self.pace.learn(work, manifest.timings.get("total_seconds", 0.0))


def run_step(step: Step, work: Work, position: str, clock: Clock) -> Manifest:
    """Runs one step with a line before and after it."""
    print(f"{position} {step.name} ... {clock.estimate(step, work)}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    manifest = step.run()
    seconds = time.perf_counter() - started
    clock.learn(work, manifest)
    print(f"{position} {step.name}: {seconds:.1f} s -> {step.output}", file=sys.stderr, flush=True)
    return manifest
