"""Canonical tensors and those of a Hugging Face directory: only names and the order of rows differ."""

from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats import parts
from nemo_minitron.checkpoints.formats.huggingface.families import FAMILIES, OUTER
from nemo_minitron.checkpoints.names import EMBEDDING, OUTPUT
from nemo_minitron.checkpoints.tensors import Lazy, same_bits
from nemo_minitron.errors import CheckpointError

CONFIG, HF_LAYERS = "config.json", "model.layers."
#: Buffers that older checkpoints carry.
BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def import_tensors(stored: Mapping[str, Lazy], a: Architecture, where: Path) -> dict[str, Lazy]:
    """Tensors by canonical name; raises CheckpointError naming what is missing or left over."""
    left = {name: tensor for name, tensor in stored.items() if not name.endswith(BUFFERS)}
    if a.num_layers > len(left):
        raise CheckpointError(
            f"{where} has {len(left)} tensors, too few for the {a.num_layers} layers of its config.json"
        )
    if a.share_embeddings_and_output_weights:
        _check_tied(left.pop(OUTER[OUTPUT], None), left.get(OUTER[EMBEDDING]), where)
    return parts.assembled(left, hf_names(a), a, where, CONFIG)


def _check_tied(output: Lazy | None, embedding: Lazy | None, where: Path) -> None:
    """Raises CheckpointError where an output layer is stored that is not the embedding, to which it is tied."""
    if output is not None and embedding is not None and not same_bits(output, embedding):
        raise CheckpointError(
            f"{where}: {OUTER[OUTPUT]} differs from {OUTER[EMBEDDING]}, and tie_word_embeddings makes them one, so "
            "that its values would be lost: state tie_word_embeddings=false in config.json if they are the model's, or "
            "take the tensor out"
        )


def hf_names(a: Architecture) -> parts.Names:
    """Canonical name -> (Hugging Face names, canonical shape), in the order of a forward pass."""
    return parts.names_of(a, OUTER, HF_LAYERS, FAMILIES[a.family].layer)


def export_tensors(tensors: Mapping[str, Lazy], a: Architecture) -> dict[str, Lazy]:
    """Hugging Face name -> tensor; the vocabulary without its padding."""
    return parts.taken_apart(tensors, hf_names(a), a)
