"""How byte-level tokenizers split a text before its bytes are merged, by llama.cpp's names (`tokenizer.ggml.pre`).

The patterns are those of the models' own tokenizer.json; llama.cpp has the same in words that its expressions allow.
"""

import dataclasses
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"


@dataclasses.dataclass(frozen=True)
class Split:
    """How a kind of tokenizers splits a text.

    Attributes:
        patterns: one after the other.
        whole: whether a piece that is a token is taken whole, without merging (`ignore_merges`).
        composed: whether the text is normalised to NFC first; llama.cpp does not, so such texts may differ there.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    composed: bool = False


#: The first that fits is what a tokenizer is called; `default` is what older converters wrote where they did not know.
SPLITS = {
    "gpt-2": Split((_GPT2,)),
    "default": Split((_GPT2,)),
    "smollm": Split((_DIGIT, _GPT2)),
    "llama-bpe": Split((_LLAMA3 % "{1,3}",), whole=True),
    "qwen2": Split((_LLAMA3 % "",), composed=True),
    "tekken": Split((_TEKKEN,), whole=True),
}
BYTE_LEVEL = "ByteLevel"


def pre_tokenizer(split: Split) -> dict[str, Any]:
    """The pre_tokenizer of tokenizer.json: splits by each pattern, then writes bytes as characters."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split.patterns
    ]
    last = {"type": BYTE_LEVEL, "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json merges bytes that are written as characters."""
    return any(step.get("type") == BYTE_LEVEL for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers"))


def named(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level tokenizer.json splits texts; None where it has none here."""
    patterns: list[str] = []
    for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == BYTE_LEVEL and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGIT)
        elif kind == "Split" and isinstance(pattern, dict) and step.get("behavior") in ("Isolated", "Removed"):
            if (step["behavior"] == "Removed") != bool(step.get("invert")):
                return None
            patterns.append(str(pattern.get("Regex")))
        else:
            return None
    kinds = [step.get("type") for step in steps_of(definition.get("normalizer"), "normalizers")]
    if kinds not in ([], ["NFC"]):
        return None
    found = (name for name, split in SPLITS.items() if split.patterns == tuple(patterns))
    return next((name for name in found if SPLITS[name].composed or not kinds), None)


def steps_of(node: Any, inside: str) -> list[dict[str, Any]]:
    """The steps of a node of tokenizer.json: itself, or those of a sequence."""
    if not isinstance(node, dict):
        return []
    steps = node.get(inside)
    if node.get("type") != "Sequence":
        return [node]
    return [step for child in (steps if isinstance(steps, list) else []) for step in steps_of(child, inside)]
