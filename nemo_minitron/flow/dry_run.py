"""What would be done, in words: what `--dry-run` prints of a flow."""

import yaml

from nemo_minitron.flow.answers import decided
from nemo_minitron.flow.models import as_asked, searches, student_architecture
from nemo_minitron.flow.searching import found_shape
from nemo_minitron.flow.settle import Settled
from nemo_minitron.flow.steps import steps
from nemo_minitron.planning.pace import in_words

#: Of a student whose search has not ended.
ASSUMED = "its shape is found by the search, estimates are for this one"


def describe(settled: Settled) -> str:
    """The resolved plan, in words; reads no weights and touches nothing."""
    config, teacher = settled.config, settled.teacher
    lines = [f"teacher   {teacher.describe()}"]
    for name in config.prune.students:
        student = student_architecture(config, teacher, name)
        share = student.parameters() / teacher.parameters()
        assumed = searches(config, name) and found_shape(config, teacher, name) is None
        lines.append(f"{name:<9} {student.describe()}, {share:.1%} of the teacher" + f"; {ASSUMED}" * assumed)
    if settled.choices:
        lines += ["", "chosen, where the settings leave it open:"]
        lines += [f"  {choice.setting} = {choice.value}: {choice.why}" for choice in settled.choices]
    lines += ["", f"stages, under {config.output_dir}:"]
    lines += [f"  {step.describe(config, teacher)}" for step in steps(config)]
    answers = decided(config)
    if not answers.keeps and config.distill.teach == "auto":
        lines.append(f"  (the teacher's answers are not kept: {answers.why})")
    lines.append("then the table, report.json and report.html")
    lines += ["", *times(settled)]
    lines += ["", "configuration:", yaml.safe_dump(as_asked(config), sort_keys=False).rstrip()]
    return "\n".join(lines)


def times(settled: Settled) -> list[str]:
    """What each stage will take, and all together, at the rate that is assumed."""
    pace = settled.pace
    seconds = {name: pace.seconds(work) for name, work in settled.work.items()}
    total = in_words(sum(seconds.values()))
    return [
        f"time: {total} in all, at {pace.flops / 1e12:.3g} TFLOP/s ({pace.source}); hardware.tflops=N says better",
        *(f"  {name}: {in_words(value)}" for name, value in seconds.items()),
    ]
