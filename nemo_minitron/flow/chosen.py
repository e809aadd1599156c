"""A flow's settings may be open (null) until `settle` has chosen them; what comes after takes them as numbers."""

from typing import TypeVar

Value = TypeVar("Value")


def chosen(value: Value | None) -> Value:
    """`value`, that is settled by now."""
    assert value is not None, "still open: settle the flow's configuration first"
    return value
