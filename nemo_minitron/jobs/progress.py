"""How far a loop is: a bar on a terminal, a plain line every so many steps in a log."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from nemo_minitron.jobs.streams import Lasting

if TYPE_CHECKING:
    from tqdm import tqdm as Bar

#: Where ranks that a stage started by torchrun leave their error. Their standard error is kept for its message; their
#: standard output is the standard error of the process that started them.
ERROR_FILE = "NEMO_MINITRON_ERROR_FILE"
#: A log is silent no longer than this and one step.
QUIET_SECONDS = 60


class Progress:
    """Progress of one loop.

    On a terminal it is a bar. Elsewhere, as in the log of a Slurm job, it is a line after the first step, after every
    `every`-th, after the last, and after one that ends a minute or more after the line before: what was done of how
    much, the values of that step, the speed since the line before and the time left. Only rank 0 shows anything.

    Args:
        what: the work, as it stands before everything.
        total: steps, or samples, or requests, in all.
        unit: what one of them is called.
        done: how many were done when the loop begins.
        every: steps between two lines.
        stream: where it goes; none: this process's own standard error, whatever it was redirected to.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str = "step",
        done: int = 0,
        every: int = 10,
        stream: "TextIO | Lasting | None" = None,
    ) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done = self.done_before = done
        self.steps = 0
        self.bar: Bar[NoReturn] | None = None
        self.stream = (stream or _log()) if int(os.environ.get("RANK", "0")) == 0 else None
        self.started = self.last = self.printed = time.perf_counter()
        self.units, self.tokens, self.seconds = 0, 0.0, 0.0
        if self.stream is not None and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, file=self.stream)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(
        self, count: int = 1, *, step: int | None = None, tokens: float = 0, seconds: float | None = None, **values: str
    ) -> None:
        """One step is done.

        Args:
            count: how many units of the total it did.
            step: its number, for `every`; none: steps since the loop began.
            tokens: that it went through, for the speed.
            seconds: that it took; none: since the step before.
            values: name -> what is shown of it, as text.
        """
        now = time.perf_counter()
        took = max(now - self.last if seconds is None else seconds, 1e-9)
        self.last = now
        self.done, self.steps = self.done + count, self.steps + 1
        if self.stream is None:
            return
        if self.bar is not None:
            self.bar.update(count)
            self.bar.set_postfix(values | ({"tok/s": f"{tokens / took:.0f}"} if tokens else {}))
            return
        self.units, self.tokens, self.seconds = self.units + count, self.tokens + tokens, self.seconds + took
        due = self.steps == 1 or (step or self.steps) % self.every == 0 or self.done >= self.total
        if due or now - self.printed >= QUIET_SECONDS:
            self.printed = now
            self._print(f"{self.unit} {self.done} of {self.total}", values, self._speed(), self._left(now))
            self.units, self.tokens, self.seconds = 0, 0.0, 0.0

    def over(self, batches: Sequence[Any]) -> Iterator[Any]:
        """The batches of token sequences [b, s + 1], each a step of b samples once the loop asks for the next."""
        for batch in batches:
            yield batch
            self.advance(len(batch), tokens=batch[:, 1:].numel())

    def note(self, text: str, **values: str) -> None:
        """A line of its own in a log; a bar stays alone."""
        if self.stream is not None and self.bar is None:
            self._print(text, values)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _speed(self) -> str:
        """Since the line before."""
        if self.tokens:
            return f"{self.tokens / self.seconds:,.0f} tokens/s"
        return f"{self.units / self.seconds:.2f} {self.unit}s/s"

    def _left(self, now: float) -> str:
        """The time left at the pace of this loop so far."""
        done = self.done - self.done_before
        return f"{clock((now - self.started) / max(done, 1) * max(self.total - self.done, 0))} left"

    def _print(self, text: str, values: dict[str, str], *more: str) -> None:
        parts = [text, *(f"{name} {value}" for name, value in values.items()), *more]
        print(f"{self.what}: {', '.join(parts)}", file=self.stream, flush=True)


class Silent(Progress):
    """Shows nothing: for callers that do not watch."""

    def __init__(self) -> None:
        super().__init__("", 0)
        self.stream = self.bar = None


def clock(seconds: float) -> str:
    """Seconds as a clock shows them: 0:07, 12:40, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _log() -> Lasting | None:
    """Standard error, or what stands for it in a rank; None where there is none."""
    stream = sys.__stdout__ if ERROR_FILE in os.environ else sys.__stderr__
    return None if stream is None else Lasting(stream)
