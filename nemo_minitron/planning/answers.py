"""What a teacher's answers take on a disk, and what one pass of the teacher takes (minitron teach).

Legend: g hidden (teacher's), v vocabulary rows, n draws, k entries kept.
"""

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import AnswersConfig

#: Bytes a token of any form: its loss.
LOSS_BYTES = 2


def token_bytes(teacher: Architecture, asked: AnswersConfig) -> int:
    """Bytes a token; of what is drawn the most, where no entry is drawn twice.

    hidden    2 g + 2 in bf16, 4 g + 2 in fp32, g + 6 in fp8
    sampled   n (2 + 1) + 4; an entry takes 3 bytes where v is above 2^16, its count 2 where n is above 2^8
    topk      k (2 + 2) + 6
    """
    if asked.keep == "hidden":
        size = {"bf16": 2, "fp8": 1, "fp32": 4}[asked.precision] * teacher.hidden_size
        return size + (4 if asked.precision == "fp8" else 0) + LOSS_BYTES
    entry = _width(teacher.vocab_size - 1)
    if asked.keep == "sampled":
        return min(asked.draws, teacher.vocab_size) * (entry + _width(asked.draws - 1)) + 2 + LOSS_BYTES
    return min(asked.top_k, teacher.vocab_size) * (entry + 2) + 4 + LOSS_BYTES


def matrix_bytes(teacher: Architecture, asked: AnswersConfig, *, bf16: bool) -> int:
    """The output matrix, which stands beside hidden states once."""
    if asked.keep != "hidden":
        return 0
    return teacher.vocab_size * teacher.hidden_size * (2 if bf16 else 4)


def _width(largest: int) -> int:
    """Bytes that hold a number up to `largest`."""
    return max(1, -(-largest.bit_length() // 8))
