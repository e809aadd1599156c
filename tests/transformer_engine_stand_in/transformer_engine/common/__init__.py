"""What is not of one framework: recipes."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
