"""Progress of a loop: lines in a log, a bar on a terminal, nothing on other ranks."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch

from nemo_minitron.jobs import progress
from nemo_minitron.jobs.progress import Progress, Silent, clock

LINE = r"work: step (\d+) of (\d+), lm_loss (\S+), ([\d,]+) tokens/s, (\d+:\d\d) left"


def lines(**options) -> list[str]:
    """What a loop of seven steps of 50 tokens in half a second writes."""
    out = io.StringIO()
    total = options.get("done", 0) + 7
    with Progress("work", total, every=3, stream=out, **options) as shown:
        for step in range(options.get("done", 0) + 1, total + 1):
            shown.advance(step=step, tokens=50, seconds=0.5, lm_loss=f"{step / 10:.4f}")
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("done", "steps"), [(0, [1, 3, 6, 7]), (10, [11, 12, 15, 17])])
def test_a_log_has_the_first_every_nth_and_the_last_step(done, steps):
    shown = [re.fullmatch(LINE, line).groups() for line in lines(done=done)]
    assert [int(step) for step, *_ in shown] == steps
    assert all(int(total) == done + 7 and speed == "100" for _, total, _, speed, _ in shown)
    assert [loss for _, _, loss, *_ in shown] == [f"{step / 10:.4f}" for step in steps]
    assert shown[-1][4] == "0:00"


def test_a_log_is_not_silent_for_long(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    assert [line.split(",")[0] for line in lines()] == [f"work: step {step} of 7" for step in range(1, 8)]


def test_samples_count_by_the_batch_and_time_left_is_at_the_pace_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    out = io.StringIO()
    with Progress("scan", 10, unit="sample", every=2, stream=out) as shown:
        for batch in shown.over(torch.zeros(10, 9).split(4)):
            now[0] += 2.0 * len(batch)
        shown.note("held out", loss="1.5")
    assert out.getvalue().splitlines() == [
        "scan: sample 4 of 10, 4 tokens/s, 0:12 left",
        "scan: sample 8 of 10, 4 tokens/s, 0:04 left",
        "scan: sample 10 of 10, 4 tokens/s, 0:00 left",
        "scan: held out, loss 1.5",
    ]
    out = io.StringIO()
    with Progress("ask", 6, unit="question", every=10, stream=out) as shown:
        for count in (1, 2, 3):
            now[0] += 4.0
            shown.advance(count)
    assert out.getvalue().splitlines() == [
        "ask: question 1 of 6, 0.25 questions/s, 0:20 left",
        "ask: question 6 of 6, 0.62 questions/s, 0:00 left",
    ]
    assert [clock(seconds) for seconds in (7, 760, 11100)] == ["0:07", "12:40", "3:05:00"]


def test_a_terminal_has_a_bar_and_no_lines():
    ours, theirs = os.openpty()
    try:
        with os.fdopen(theirs, "w") as terminal, Progress("work", 3, every=1, stream=terminal) as shown:
            for step in range(1, 4):
                shown.advance(step=step, tokens=50, lm_loss="0.5000")
            shown.note("validation after step 3", lm_loss="0.5000")
            written = ""
            while "3/3" not in written or "lm_loss=0.5000" not in written:  # a terminal gives what is there so far
                written += os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
    assert "work:   0%" in written
    assert "\n" not in written.rstrip() and "of 3" not in written and "validation" not in written


LOOP = """
import sys
from nemo_minitron.jobs.progress import Progress
with Progress("work", 1) as shown:
    shown.advance(tokens=1, seconds=1.0)
"""


@pytest.mark.parametrize(
    ("environment", "out", "err"),
    [
        ({}, "", "work: step 1 of 1, 1 tokens/s, 0:00 left\n"),
        ({"RANK": "0"}, "", "work: step 1 of 1, 1 tokens/s, 0:00 left\n"),
        ({"RANK": "1"}, "", ""),
        # A stage's own ranks: their standard error is kept for its message, their output is its standard error.
        ({"RANK": "0", progress.ERROR_FILE: "error.json"}, "work: step 1 of 1, 1 tokens/s, 0:00 left\n", ""),
        ({"RANK": "1", progress.ERROR_FILE: "error.json"}, "", ""),
    ],
)
def test_rank_0_writes_where_it_is_read(environment, out, err):
    given = {name: value for name, value in os.environ.items() if name not in ("RANK", progress.ERROR_FILE)}
    done = subprocess.run([sys.executable, "-c", LOOP], env=given | environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


def test_a_reader_that_leaves_does_not_end_the_loop():
    command = [sys.executable, "-c", f"import sys; sys.stdin.read()\n{LOOP}\nprint('done')"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stderr.close()
        child.stdin.close()
        assert child.stdout.read() == b"done\n"
    assert child.returncode == 0


def test_who_does_not_watch_sees_nothing(capfd):
    with Silent() as shown:
        assert [batch.shape[0] for batch in shown.over(torch.zeros(3, 2).split(2))] == [2, 1]
    assert capfd.readouterr() == ("", "")
