"""A command as an application of NeMo-Run, whose ranks run it again: what both launchers start."""

import contextlib
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config import FlowConfig, PruneConfig, Ranks, StageConfig

if TYPE_CHECKING:
    from nemo_run.core.execution.base import Executor
    from nemo_run.core.execution.launcher import Torchrun
    from torchx.specs import Role

#: Configurations of commands that can be launched.
Launched = StageConfig | PruneConfig | FlowConfig
#: The module that a rank runs.
MODULE = "nemo_minitron.cli.main"


def ranks(config: Launched) -> Ranks:
    """The processes that a command is configured to run as."""
    return config.hardware.launch() if isinstance(config, FlowConfig) else config.trainer.launch()


def role_of(name: str, arguments: Sequence[str], executor: "Executor") -> "Role":
    """The one role of NeMo-Run's application for the command."""
    from nemo_run import Script
    from nemo_run.run.torchx_backend.packaging import package

    script = Script(path=MODULE, m=True, entrypoint="python", args=[name, *arguments])
    return package(name, script, executor, serialize_metadata_for_scripts=False).roles[0]


def torchrun_launcher(name: str, arguments: Sequence[str]) -> "Torchrun":
    """NeMo-Run's torchrun launcher, with a rendezvous id that is the same wherever the same command is given."""
    from nemo_run.core.execution.launcher import Torchrun

    return Torchrun(rdzv_id=1 + zlib.crc32("\0".join([name, *arguments]).encode()) % 10_000)


def program(name: str) -> str:
    """The program `name` that belongs to this Python."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In the body, NeMo-Run prints nothing, and the shells that it starts read nothing."""
    from nemo_run.core.frontend.console.api import CONSOLE

    before, CONSOLE.quiet = (CONSOLE.quiet, sys.stdin), True
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            CONSOLE.quiet, sys.stdin = before
