"""Locks on outputs, between processes of one machine or of machines that share a file system with flock."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from nemo_minitron.errors import EngineError, MinitronError

#: Errors of a disk that is full, which a job says itself.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass
class Lock:
    """A lock that is held until it is released or the process ends."""

    path: Path
    file: TextIO


def take(output: Path) -> Lock:
    """Locks `output`, which need not exist.

    Raises:
        EngineError: another process holds it.
        MinitronError: nothing can be written beside it.
    """
    output = output.absolute()
    path = output.with_name(f".{output.name}.lock")
    while True:
        file = _opened(path, output)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise EngineError(
                f"{output} is being made by another process{holder}: wait for it to end, or give another output"
            ) from None
        if _is_still_there(path, file):
            break
        file.close()
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    return Lock(path, file)


def _opened(path: Path, output: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+", encoding="utf-8")
    except OSError as error:
        if error.errno in FULL:
            raise
        raise MinitronError(
            f"{output} cannot be made: {error.filename}: {error.strerror}; name another folder for it"
        ) from None


def release(lock: Lock) -> None:
    """Frees the lock and removes its file; nobody can have taken it in between."""
    with contextlib.suppress(OSError):
        lock.path.unlink()
    lock.file.close()


def _is_still_there(path: Path, file: TextIO) -> bool:
    """Whether the file that was locked is the one at `path`: the holder before may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _holder(file: TextIO) -> str:
    with contextlib.suppress(ValueError, KeyError, OSError, TypeError):
        file.seek(0)
        holder = json.loads(file.read())
        return f" ({int(holder['pid'])} on {holder['host']})"
    return ""
