"""Small teachers and students in plain PyTorch: what the benchmarks of cuts and of distillation share.

Models are transformers' Llama, data Megatron's indexed datasets, cuts the package's own stages. All of it runs on one
CPU thread, and the same seed gives the same models.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY, LENGTH = 1024, 128


def prepared(folder: Path, source: str, **fields: Any) -> Path:
    """The datasets of a text, made by `minitron data`, or found made."""
    from nemo_minitron.config import DataConfig
    from nemo_minitron.data.command import prepare

    prepare(DataConfig(output=str(folder), source=source, vocab_size=VOCABULARY, **fields))
    return folder


def windows(prefix: Path, count: int, generator: Any, length: int = LENGTH) -> Any:
    """Random training windows [count, length + 1]."""
    import numpy
    import torch

    from nemo_minitron.data.samples import token_stream

    stream = token_stream(str(prefix))
    starts = torch.randint(0, len(stream) - length, (count,), generator=generator)
    return torch.stack([torch.from_numpy(stream[start : start + length + 1].astype(numpy.int64)) for start in starts])


def test_windows(data: Path, count: int, length: int = LENGTH, split: str = "test") -> Any:
    """The first windows of the test text, side by side [count, length + 1]."""
    from nemo_minitron.data.samples import consecutive_sequences

    return consecutive_sequences([str(data / split)], length, count)


def loss_of(model: Any, tokens: Any, batch: int = 32) -> float:
    """Mean loss a token on windows [n, length + 1], nats."""
    import torch

    total, device = 0.0, next(model.parameters()).device
    with torch.no_grad():
        for part in tokens.split(batch):
            part = part.to(device)
            logits = model(part[:, :-1], use_cache=False).logits.float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
    return total / tokens[:, 1:].numel()


def parameters_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cross_entropy(student: Any, teacher: Any, labels: Any) -> Any:
    """The language-model loss, a mean over tokens; of no use for a teacher."""
    import torch

    return torch.nn.functional.cross_entropy(student, labels)


def kl(student: Any, teacher: Any, labels: Any) -> Any:
    """Forward KL on logits, a mean over tokens."""
    from nemo_minitron.distillation.losses.api import forward_kl

    return forward_kl(student, teacher).mean()


def train(
    model: Any,
    steps: int,
    lr: float,
    batch: int,
    prefix: Path,
    seed: int,
    teacher: Any = None,
    objective: Callable[[Any, Any, Any], Any] | None = None,
    length: int = LENGTH,
    warmup: float = 0.05,
) -> None:
    """AdamW with a cosine and clipping; on a GPU products are in bf16.

    Args:
        warmup: share of the steps.
        objective: of the student's and the teacher's logits [tokens, v] (None without a teacher) and the labels
            [tokens]; none: forward KL with a teacher, else the language-model loss.
    """
    import torch

    objective = objective or (cross_entropy if teacher is None else kl)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    rising, device = int(warmup * steps), next(model.parameters()).device
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=max(1, rising))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rising), eta_min=lr / 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [max(1, rising)])
    model.train()
    for _ in range(steps):
        tokens = windows(prefix, batch, generator, length).to(device)
        target = None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
            logits = model(tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
        loss = objective(logits, target, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def new_model(shape: dict[str, Any], seed: int) -> Any:
    """A Llama from random weights; `shape` in Megatron's names."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=shape["hidden_size"], intermediate_size=shape["ffn_hidden_size"],
            num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_attention_heads"],
            num_key_value_heads=shape["num_query_groups"], head_dim=shape["kv_channels"],
            max_position_embeddings=LENGTH, tie_word_embeddings=False,
        )
    )  # fmt: skip


def save(model: Any, folder: Path) -> None:
    """A Hugging Face directory, there when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def load(folder: Path) -> Any:
    """transformers' model of a checkpoint, in the dtype of its weights."""
    import torch

    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.checkpoints.transformers_model import load_model

    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint, getattr(torch, checkpoint.dtype))


def prune_config(
    teacher: Path,
    data: Path,
    output: Path,
    samples: int,
    seed: int,
    *,
    length: int = LENGTH,
    batch: int = 16,
    accelerator: str = "cpu",
    **targets: Any,
) -> Any:
    """Settings of `minitron prune` for a teacher of this benchmark; on a GPU in fp32, too."""
    from nemo_minitron import config as c

    return c.validated(
        c.PruneConfig(
            seed=seed,
            to="hf",
            trainer=c.TrainerConfig(accelerator=accelerator, precision="32"),
            model=c.PruneModelConfig(
                restore_from_path=str(teacher),
                data=c.ModelDataConfig(data_prefix=str(data), seq_length=length),
            ),
            inference=c.InferenceConfig(batch_size=batch),
            prune=c.PruneTargets(num_samples=samples, num_block_samples=samples, **targets),
            export=c.ExportConfig(save_path=str(output)),
        )
    )


def made_up_scores(folder: Path, teacher: Path, method: str, seed: int) -> None:
    """Scores at random, or by the norms of weights: of a channel's rows and columns, of a layer's matrices."""
    import torch

    from nemo_minitron.artifacts import ImportanceScores
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(teacher)
    a, generator = checkpoint.architecture, torch.Generator().manual_seed(seed)
    folder.mkdir()
    if method == "random":
        shapes = {
            "hidden": (2 * a.num_layers, a.hidden_size), "ffn": (a.num_layers, a.ffn_hidden_size),
            "heads": (a.num_layers, a.num_attention_heads * a.kv_channels), "block_influence": (a.num_layers,),
        }  # fmt: skip
        scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    else:
        inside = [
            {name: checkpoint.tensors[f"decoder.layers.{layer}.{name}.weight"].read() for name in (
                "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")}
            for layer in range(a.num_layers)
        ]  # fmt: skip
        qkv, proj, fc1, fc2 = zip(*(matrices.values() for matrices in inside))
        reads = [matrix.pow(2).sum(0) for pair in zip(qkv, fc1) for matrix in pair]
        writes = [matrix.pow(2).sum(1) for pair in zip(proj, fc2) for matrix in pair]
        gates = [matrix.view(2, a.ffn_hidden_size, -1).pow(2).sum((0, 2)) for matrix in fc1]
        scores = {
            "hidden": torch.stack([(sum(reads) + sum(writes)).clone()] * (2 * a.num_layers)),
            "ffn": torch.stack([gate + matrix.pow(2).sum(0) for gate, matrix in zip(gates, fc2)]),
            "heads": torch.stack([matrix.pow(2).sum(0) for matrix in proj]),
            "block_influence": torch.stack([sum(m.pow(2).sum() for m in matrices.values()) for matrices in inside]),
        }
    ImportanceScores(**scores).save(folder)
