"""A plan as text."""

from typing import Any

KINDS = ("weights", "gradients", "optimizer", "teacher", "activations", "loss", "statistics", "work")


GIGA, MEGA = ("G", 1e9), ("M", 1e6)


def render(plan: dict[str, Any]) -> str:
    """Models, the layout that was asked for, and every layout of the ranks."""
    lines = [f"teacher  {plan['teacher']['description']}"]
    if plan["student"]:
        share = plan["student"]["parameters"] / plan["teacher"]["parameters"]
        lines.append(f"student  {plan['student']['description']}, {share:.1%} of the teacher")
    lines += [_hardware(plan), *_instead(plan), "", *_stages(plan), _teach(plan["teach"])]
    if plan["layouts"]:
        lines += ["", *_layouts(plan)]
    return "\n".join(lines)


def _hardware(plan: dict[str, Any]) -> str:
    hardware, batch = plan["hardware"], plan["batch"]
    what = "GPU" if hardware["accelerator"] == "gpu" else "CPU process"
    ranks = hardware["devices"] * hardware["num_nodes"]
    memory = f" of {hardware['memory_gb']:g} GB" if hardware["memory_gb"] else ""
    nodes = f" on {hardware['num_nodes']} nodes" if hardware["num_nodes"] > 1 else ""
    kind = "bf16 with fp32 main parameters" if hardware["precision"] == "bf16" else "fp32"
    layers = "" if hardware["transformer_engine"] else ", layers without Transformer Engine"
    return (
        f"ranks    {ranks} {what}{'s' if ranks > 1 else ''}{memory}{nodes}, {kind}{layers}; sequence "
        f"{batch['seq_length']}, micro batch {batch['micro_batch_size']}, global batch {batch['global_batch_size']}"
    )


def _instead(plan: dict[str, Any]) -> list[str]:
    """What was left of the sequence and the micro batch, so that all fits."""
    asked = plan["instead_of"]
    if asked is None:
        return []
    return [
        f"         (sequence {asked['seq_length']} x micro batch {asked['micro_batch_size']} does not fit: "
        f"{asked['stage']} would need {asked['total'] / 1e9:.1f} GB)"
    ]


def unit_of(plan: dict[str, Any]) -> tuple[str, float]:
    """Giga where a stage has so much, mega otherwise."""
    return GIGA if max(stage["total"] for stage in plan["stages"].values()) >= 1e9 else MEGA


def named(layout: dict[str, Any]) -> str:
    """A layout in short: tensor x pipeline x data parallel."""
    return f"{layout['tensor_parallel']} x {layout['pipeline_parallel']} x {layout['data_parallel']}"


def _stages(plan: dict[str, Any]) -> list[str]:
    stages = plan["stages"]
    unit, size = unit_of(plan)
    prefix, one = GIGA if all(stage["flops_per_token"] >= 1e9 for stage in stages.values()) else MEGA
    kinds = [kind for kind in KINDS if any(stage["bytes"][kind] for stage in stages.values())]
    header = ["stage", "TP x PP x DP", *kinds, "total", "fits", "fullest at", f"{prefix}FLOP/token"]
    rows = []
    for name, stage in stages.items():
        numbers = [f"{stage['bytes'][kind] / size:.2f}" if stage["bytes"][kind] else "" for kind in kinds]
        place = stage["moment"]
        if stage["layout"]["pipeline_parallel"] > 1:
            place += f", stage {stage['pipeline_stage'] + 1}"
        rows.append(
            [name, named(stage["layout"]), *numbers, f"{stage['total'] / size:.2f}", _fits(stage["fits"]), place]
            + [f"{stage['flops_per_token'] / one:.1f}"]
        )
    lines = [
        f"{unit}B on the fullest rank (10^{9 if size == 1e9 else 6} bytes; without interpreter, libraries, contexts):"
    ]
    lines += grid(header, rows, left=(0, 1, len(header) - 2))
    for name, stage in stages.items():
        if "tokens_per_second" in stage:
            step = f", {stage['seconds_per_step']:.3g} s a step" if "seconds_per_step" in stage else ""
            lines.append(f"{name}: {stage['tokens_per_second']:.3g} tokens a second{step}, at the TFLOP/s given")
    return lines


def _teach(answers: dict[str, Any]) -> str:
    """What the teacher's answers take."""
    kinds = {"hidden": "hidden states in bf16", "fp8": "in fp8", "sampled": "64 draws up to"}
    if "bytes" in answers:
        parts = [f"{words} {answers['bytes'][name] / 1e9:,.1f} GB" for name, words in kinds.items()]
    else:
        parts = [f"{words} {answers['bytes_per_token'][name]:,} bytes a token" for name, words in kinds.items()]
    speed = f"; {answers['tokens_per_second']:.3g} tokens a second" if "tokens_per_second" in answers else ""
    hours = f", {answers['hours']:.3g} hours" if "hours" in answers else ""
    return f"teach: the teacher's answers, kept: {', '.join(parts)}{speed}{hours}"


def _layouts(plan: dict[str, Any]) -> list[str]:
    names, limit = plan["layouts_of"], plan["hardware"]["memory_gb"]
    unit, size = unit_of(plan)
    shown = [row for row in plan["layouts"] if row["total"] or row["largest_micro_batch"]]
    header = ["TP x PP x DP", *names, "pipeline idle"] + (["micro batch up to", "fits"] if limit else [])
    rows = []
    for row in shown:
        totals = [f"{row['total'][name] / size:.1f}" if name in row["total"] else "" for name in names]
        idle = (row["pipeline_parallel"] - 1) / (row["micro_batches"] + row["pipeline_parallel"] - 1)
        cells = [named(row), *totals, f"{idle:.0%}" if idle else ""]
        if limit:
            cells += [str(row["largest_micro_batch"] or "none"), "yes" if row["problem"] is None else row["problem"]]
        rows.append(cells)
    title = f"every layout, {unit}B on the fullest rank, best first:"
    lines = [title, *grid(header, rows, left=(0, len(header) - 1) if limit else (0,))]
    reasons: dict[str, list[str]] = {}
    for row in plan["layouts"]:
        if row not in shown:
            reasons.setdefault(row["problem"], []).append(named(row))
    if reasons:
        lines += ["not possible:", *(f"  {', '.join(where)}: {why}" for why, where in reasons.items())]
    return lines


def _fits(value: bool | None) -> str:
    return {None: "", True: "yes", False: "NO"}[value]


def grid(header: list[str], rows: list[list[str]], left: tuple[int, ...]) -> list[str]:
    """Columns as wide as they need to be; those in `left` are flush left."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: list[str]) -> str:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        return "  ".join(padded).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
