"""SIGTERM: what schedulers send before they take a machine away."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

#: Names a file that the process which started this rank makes when it is asked to stop.
STOP_FILE = "NEMO_MINITRON_STOP_FILE"


class StopRequest:
    """Whether this process, or the one that started it, was asked to stop."""

    def __init__(self) -> None:
        self.signalled = self.listening = False
        self.before = signal.getsignal(signal.SIGTERM)

    def listen(self) -> None:
        """Takes SIGTERM from now on; in threads other than the main one only the file is looked at."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
            self.listening = True

    def _note(self, *_: object) -> None:
        self.signalled = True

    def close(self) -> None:
        """Gives SIGTERM back to whoever had it when this was made."""
        if self.listening:
            signal.signal(signal.SIGTERM, self.before)
            self.listening = False

    def asked(self) -> bool:
        """Whether any rank was asked; every rank calls it at the same time."""
        import torch

        path = os.environ.get(STOP_FILE)
        asked = self.signalled or bool(path and os.path.exists(path))
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return asked
        flag = torch.tensor([int(asked)], device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


@contextlib.contextmanager
def passed_on(stop_file: Path) -> Iterator[None]:
    """In the body, a SIGTERM to this process makes `stop_file`, and ends nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    make: Callable[..., None] = lambda *_: stop_file.touch()  # noqa: E731
    before = signal.signal(signal.SIGTERM, make)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
