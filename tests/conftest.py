"""One tiny teacher, trained once, for every test that needs a model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron import config as c
from nemo_minitron.megatron import session

# No test asks the hub for anything; those that want one start their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two workers share two cores; the processes that they start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
session.stages_alone = True
SEQ_LENGTH = 64
GRID = {"hidden_size_divisor": 32, "ffn_hidden_size_divisor": 64, "num_layers_divisor": 1}
PUBLISHED = {"method": "minitron", "depth_by": "block_influence"}
ARCHITECTURE = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": None,
    "seq_length": SEQ_LENGTH,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Folders of the shared run."""

    root: Path
    data: Path
    teacher: Path

    def training(self, output: Path, steps: int = 4, **model) -> dict:
        """Fields of a training stage's configuration on the shared data."""
        return {
            "trainer": c.TrainerConfig(
                max_steps=steps, val_check_interval=max(1, steps // 2), limit_val_batches=2, accelerator="cpu"
            ),
            "model": c.ModelConfig(
                nemo_path=str(output),
                micro_batch_size=4,
                global_batch_size=8,
                data=c.ModelDataConfig(data_prefix=str(self.data), seq_length=SEQ_LENGTH, num_workers=0),
                optim=c.OptimConfig(lr=2e-3, sched=c.SchedConfig(warmup_steps=2, min_lr=2e-4)),
                **model,
            ),
        }

    def pruning(self, output: Path, teacher: Path | None = None, **targets) -> c.PruneConfig:
        """A pruning configuration for the shared teacher: the published cut, unless another is asked for."""
        return c.PruneConfig(
            trainer=c.TrainerConfig(accelerator="cpu"),
            model=c.PruneModelConfig(
                restore_from_path=str(teacher or self.teacher),
                data=c.ModelDataConfig(data_prefix=str(self.data), seq_length=SEQ_LENGTH),
            ),
            inference=c.InferenceConfig(batch_size=8),
            prune=c.PruneTargets(**{**PUBLISHED, "num_samples": 16, "num_block_samples": 16, **GRID, **targets}),
            export=c.ExportConfig(save_path=str(output)),
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """The shared corpus and the teacher that was trained on it."""
    from nemo_minitron.data.command import prepare
    from nemo_minitron.packages.versions import has_nemo
    from nemo_minitron.training.finetune import finetune

    root = tmp_path_factory.mktemp("tiny")
    shared = Tiny(root=root, data=root / "data", teacher=root / "teacher")
    prepare(c.DataConfig(output=str(shared.data), words=60_000, vocab_size=512))
    if has_nemo():
        fields = shared.training(shared.teacher, steps=40, init="random", architecture=ARCHITECTURE)
        finetune(c.FinetuneConfig(**fields))
    else:
        train_without_nemo(shared, steps=200)
    return shared


def train_without_nemo(shared: Tiny, steps: int) -> None:
    """The same teacher, trained by transformers and PyTorch alone, as a NeMo-2 checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.conversion.convert import convert
    from nemo_minitron.data.samples import random_sequences

    torch.manual_seed(1234)
    a = ARCHITECTURE
    sizes = {
        "num_hidden_layers": a["num_layers"], "hidden_size": a["hidden_size"],
        "intermediate_size": a["ffn_hidden_size"], "num_attention_heads": a["num_attention_heads"],
        "num_key_value_heads": a["num_query_groups"], "head_dim": a["kv_channels"], "vocab_size": 512,
        "max_position_embeddings": a["seq_length"], "rms_norm_eps": 1e-5,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sequences, _ = random_sequences([str(shared.data / "train")], 8 * steps, SEQ_LENGTH, 1234)
    for batch in sequences.split(8):
        inputs = batch[:, :-1]
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(shared.root / "teacher-hf")
    tokenizer = str(shared.data / "tokenizer")
    source, output = str(shared.root / "teacher-hf"), str(shared.teacher)
    convert(c.validated(c.ConvertConfig(source=source, output=output, to="nemo2", tokenizer=tokenizer, verify="none")))


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory):
    """The process that forks ranks (forked_ranks.py), which has the engines imported."""
    said = tmp_path_factory.mktemp("ranks") / "server"
    command = [sys.executable, str(Path(__file__).with_name("forked_ranks.py"))]
    with said.open("w") as log, subprocess.Popen(command, stdin=-1, stdout=-1, stderr=log, text=True) as server:
        yield server
        server.stdin.close()


@pytest.fixture
def forked_ranks(rank_server, tmp_path, monkeypatch):
    """Ranks are forked instead of started by torchrun, which saves each the import of the engines."""

    as_it_is = subprocess.run

    def run(command, **options):
        if "nemo_minitron.launch.ranks" not in command:
            return as_it_is(command, **options)
        ranks, port = (
            next(int(text.partition("=")[2]) for text in command if text.startswith(f"--{name}="))
            for name in ("nproc-per-node", "master-port")
        )
        said = tmp_path / "said-by-ranks"
        arguments = command[command.index("nemo_minitron.launch.ranks") + 1 :]
        job = {
            "ranks": ranks,
            "port": port,
            "arguments": arguments,
            "environment": {**options["env"]},
            "said": str(said),
        }
        rank_server.stdin.write(json.dumps(job) + "\n")
        rank_server.stdin.flush()
        code = int(rank_server.stdout.readline())
        sys.stderr.write(said.read_text())
        return subprocess.CompletedProcess(command, code, "", said.read_text())

    monkeypatch.setattr("nemo_minitron.launch.ranks.subprocess.run", run)


@pytest.fixture(scope="session")
def small_models(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with random weights and a tokenizer: families, shapes, formats."""
    import torch

    import models
    from nemo_minitron.conversion.convert import convert
    from nemo_minitron.data.synthetic.corpus import documents
    from nemo_minitron.data.tokenizer import train_bpe
    from nemo_minitron.pruning.command import prune

    root = tmp_path_factory.mktemp("small")
    train_bpe(documents("encyclopedic", "train", 20_000, 1234), 259, root / "tokenizer")
    found = {"tokenizer": root / "tokenizer"}
    for name in ("llama2", "nemotron", "minitron-width", "mistral-nemo"):
        found[name] = models.save(name, torch.float32, root / name)
        train_bpe(documents("encyclopedic", "train", 20_000, 1234), 259, found[name])
    for form, name in (("nemo2", "llama-nemo2"), ("nemo1", "nemotron.nemo")):
        source = found[name.partition("-")[0].removesuffix(".nemo").replace("llama", "llama2")]
        found[form] = root / name
        convert(c.ConvertConfig(source=str(source), output=str(found[form]), to=form, verify="none"))
    for name, teacher in (("depth", "llama2"), ("mistral-depth", "mistral-nemo")):
        found[name] = root / name
        cut = c.PruneConfig(
            trainer=c.TrainerConfig(accelerator="cpu"),
            model=c.PruneModelConfig(restore_from_path=str(found[teacher])),
            prune=c.PruneTargets(method="minitron", drop_layers=[2], num_layers_divisor=1),
            export=c.ExportConfig(save_path=str(found[name])),
            to="hf",
        )
        prune(c.validated(cut))
    return found
