"""Errors that a user can act on.

Every message says what is wrong, where, and what to do. The command line prints them as one message and exits with
``exit_code``; a traceback is shown only with ``--debug``.
"""


class MinitronError(Exception):
    """Base class: anything the user can mend."""

    exit_code = 1


class ConfigError(MinitronError):
    """The configuration is wrong. Carries every problem found, not only the first.

    Args:
        problems: one message a problem.
        source: what was being read, for the headline.
    """

    exit_code = 2

    def __init__(self, problems: list[str] | str, source: str = "configuration"):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{source}: {len(self.problems)} problems\n{lines}")


class CheckpointError(MinitronError):
    """A checkpoint is missing, truncated, of an unknown format, or does not fit what it claims to be."""


class DataError(MinitronError):
    """A corpus, tokenizer or dataset cannot be used."""


class OutputExistsError(MinitronError):
    """The output is there already and was made from something else; nothing was overwritten."""


class EngineError(MinitronError):
    """The hardware, the parallel layout or the installed libraries cannot do what was asked."""


class MissingPackageError(EngineError):
    """A package that is asked for is not installed, or not in the version that is needed."""


class NonFiniteLossError(MinitronError):
    """Training met a loss that is not a number or infinite."""


class PreemptedError(MinitronError):
    """Training was asked to stop (SIGTERM), and saved what it had; the same command goes on from there.

    The exit code is EX_TEMPFAIL of sysexits.h: a scheduler may start the job again.
    """

    exit_code = 75
