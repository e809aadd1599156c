"""A limit of time for a call that damaged input may keep busy."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body after so many seconds."""

    def late(*_):
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
