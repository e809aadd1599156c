"""The share of the gap that was closed, and where it says nothing."""

import pytest

from nemo_minitron.report.page import model_table
from nemo_minitron.report.table import add_gaps, legend, noise, render_table

KINDS = ("teacher", "corrected", "pruned", "distilled", "control")


def table(losses: dict[str, float], tokens: object = 32768) -> list[dict]:
    """Rows of one student with these test losses."""
    return add_gaps(
        [
            {
                "model": kind, "kind": kind, "student": "s" if kind in KINDS[2:] else None, "parameters": 1000,
                "validation": {"loss": losses[kind], "perplexity": 1.0, "tokens": tokens},
                "test": {"loss": losses[kind], "perplexity": 1.0, "tokens": tokens},
            }
            for kind in KINDS if kind in losses
        ]
    )  # fmt: skip


def shown(rows: list[dict]) -> list[str]:
    """The table's last cell of the distilled student and the control; as on the page."""
    lines = render_table(rows).splitlines()[2:]
    cells = [line.split()[-1] for line, row in zip(lines, rows) if row["kind"] in ("distilled", "control")]
    on_page = [line[-1] for line, row in zip(model_table(rows).rows, rows) if row["kind"] in ("distilled", "control")]
    assert on_page == cells
    return cells


def test_a_gap_beyond_its_noise_is_a_share():
    rows = table({"corrected": 0.9001, "pruned": 1.0028, "distilled": 0.9357, "control": 0.9412})
    assert shown(rows) == ["65%", "60%"] and "-:" not in legend(rows)
    worse = table({"corrected": 3.0, "pruned": 3.2, "distilled": 3.6, "control": 3.2})
    assert shown(worse) == ["-200%", "0%"]


@pytest.mark.parametrize("pruned", [3.0, 2.99, 3.0095])
def test_a_gap_within_its_noise_says_nothing(pruned):
    """-2627% as it was read from a table: 0.0095 nats of cut, 0.25 of training that made it worse."""
    rows = table({"corrected": 3.0, "pruned": pruned, "distilled": 3.26, "control": 3.001})
    assert [row["gap_closed"] for row in rows] == [None] * 4
    assert shown(rows) == ["-", "-"] and legend(rows).endswith("-: the cut cost no more than the noise of that")


def test_the_noise_falls_with_the_tokens_and_grows_with_the_difference():
    assert noise(0.0, 1) == noise(5.0, None) == noise(5.0, "many") == noise(5.0, float("nan")) == noise(5.0, -3) == 0.01
    assert noise(0.5, 100) > noise(0.5, 1000) > noise(0.1, 1000) > 0.01
    few = table({"corrected": 3.0, "pruned": 3.2, "distilled": 3.1, "control": 3.1}, tokens=100)
    assert shown(few) == ["-", "-"]


def test_what_lacks_a_row_has_no_gap():
    assert {row["gap_in_noise"] for row in table({"teacher": 3.0, "pruned": 3.2, "distilled": 3.1})} == {False}
    assert "-" not in render_table(table({"corrected": 3.0, "distilled": 3.1})).splitlines()[-1].split()
