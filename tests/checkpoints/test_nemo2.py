"""NeMo-2 checkpoints: what we write, plain NeMo and transformers read; what is broken is refused."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf import llama, nemotron, read_weights
from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.files import folder_files
from nemo_minitron.checkpoints.formats.nemo2.classes import WEIGHTS
from nemo_minitron.checkpoints.names import EXTRA_STATE, canonical_shapes, extra_states
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron.layout import Layout
from sizes import NEMOTRON, SMALL

CPU = Layout(cuda=False, bf16=False)
FAMILIES = {
    "llama": {"family": "llama", "rotary_base": 500000.0},
    "llama31": {"family": "llama", "rope_scaling": RopeScaling()},
    "mistral": {"family": "mistral"},
    "nemotron": NEMOTRON,
    "qwen2": {"family": "qwen2", "add_qkv_bias": True, "layernorm_epsilon": 1e-6},
    "qwen3": {"family": "qwen3", "qk_layernorm": True, "layernorm_epsilon": 1e-6},
    "tied": {"family": "llama", "share_embeddings_and_output_weights": True},
}

PLAIN_NEMO = """
import sys, json, torch
# Plain NeMo on a machine without CUDA: the two calls of Megatron's that ask CUDA for its device.
torch.cuda.current_device = lambda: "cpu"
torch.cuda.set_rng_state = lambda state, device=None: None
from pathlib import Path
from megatron.core import dist_checkpointing, parallel_state
from nemo.lightning.io import load_context

path, tokens = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model = load_context(path / "context", subpath="model")
config = model.config
config.use_cpu_initialization = True
config.masked_softmax_fusion = config.persist_layer_norm = config.gradient_accumulation_fusion = False
config.bias_activation_fusion = config.bias_dropout_fusion = config.cross_entropy_loss_fusion = False
config.attention_dropout = 0.0
module = config.configure_model(model.tokenizer).eval()
loaded, left_over, missing = dist_checkpointing.load(
    {"state_dict": module.sharded_state_dict(prefix="module.")}, str(path / "weights"), strict="return_all"
)
# Without Transformer Engine two of its extra states have no module; all else is there, and nothing more.
attention, norm = "layers.self_attention.core_attention", "final_layernorm"
assert left_over == {f"module.decoder.{name}._extra_state" for name in (attention, norm)}, left_over
assert not missing, missing
module.load_state_dict({k.removeprefix("module."): v for k, v in loaded["state_dict"].items()}, strict=False)
import megatron.core.transformer.dot_product_attention as attention
import contextlib
tracker = type("Tracker", (), {"fork": lambda self: contextlib.nullcontext()})()
attention.tensor_parallel.get_cuda_rng_tracker = lambda: tracker
with torch.no_grad():
    length = tokens.shape[1]
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    logits = module(tokens, torch.arange(length)[None], mask)
torch.save(logits, sys.argv[4])
assert not [name for name in sys.modules if name.startswith("nemo_minitron")], "nemo_minitron was imported"
print(type(model).__name__, type(model.tokenizer).__name__)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_bit_exact_and_keeps_the_architecture(family, tmp_path):
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import save_checkpoint

    architecture = Architecture(**SMALL, **FAMILIES[family])
    with engine(3, tmp_path / "log"), parallel_ranks(CPU, 3):
        made = load_model(architecture, CPU, None)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        before = {name: value.clone() for name, value in made.state_dict().items() if torch.is_tensor(value)}
        output = tmp_path / "checkpoint"
        save_checkpoint(made, architecture, output, output=output, to=None, tokenizer=None)
        after = load_model(architecture, CPU, open_checkpoint(tmp_path / "checkpoint")).state_dict()
    assert open_checkpoint(tmp_path / "checkpoint").architecture == architecture
    if family != "nemotron":  # where gamma - 1 is stored, adding 1 back rounds
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.allclose(after[name], value, rtol=0, atol=2e-7) for name, value in before.items())
    stored = read_weights(tmp_path / "checkpoint")
    assert sum(tensor.numel() for tensor in stored.values()) == architecture.parameters()
    assert extra_states_of(output) == set(extra_states(architecture.num_layers, canonical_keys(architecture)))


def extra_states_of(checkpoint: Path) -> set[str]:
    """Keys of the extra states that Megatron saved."""
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(str(checkpoint / "weights")).read_metadata().state_dict_metadata
    return {key.removeprefix("module.") for key in keys if EXTRA_STATE in key}


def canonical_keys(architecture: Architecture) -> set[str]:
    """Names of the weights, stacked."""
    return {re.sub(r"layers\.\d+\.", "layers.", name) for name in canonical_shapes(architecture)}


def test_a_nemotron_computes_what_transformers_does_before_and_after_a_cut(tiny, tmp_path):
    """LayerNorm with zero-centred gamma, squared ReLU, partial rotary: checkpoint, scores and cut."""
    from nemo_minitron.config import FinetuneConfig, LossConfig
    from nemo_minitron.data.samples import consecutive_sequences
    from nemo_minitron.evaluation.loss import evaluate_loss
    from nemo_minitron.pruning.command import prune
    from nemo_minitron.training.finetune import finetune

    architecture = {**SMALL, **NEMOTRON, "vocab_size": 512, "seq_length": 64}
    finetune(FinetuneConfig(**tiny.training(tmp_path / "teacher", 3, init="random", architecture=architecture)))
    prune(tiny.pruning(tmp_path / "student", tmp_path / "teacher", hidden_size=32, ffn_hidden_size=64))
    sequences = consecutive_sequences([str(tiny.data / "test")], 64, 8)
    for name in ("teacher", "student"):
        fields = tiny.training(tmp_path / f"{name}-loss", restore_from_path=str(tmp_path / name))
        measured = evaluate_loss(LossConfig(**fields, limit_batches=1, splits=["test"])).metrics["test"]["loss"]
        model = nemotron(tmp_path / name, open_checkpoint(tmp_path / name).architecture).double()
        with torch.no_grad():
            logits = model(sequences[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        assert measured == pytest.approx(float(expected), abs=2e-5), name


def test_plain_nemo_loads_a_pruned_student_and_computes_what_transformers_does(tiny, tmp_path):
    from nemo_minitron.pruning.command import prune

    prune(tiny.pruning(tmp_path / "student", hidden_size=96, ffn_hidden_size=192, drop_layers=[2]))
    architecture = open_checkpoint(tmp_path / "student").architecture
    tokens = torch.randint(0, architecture.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    arguments = [
        str(tmp_path / "student"),
        json.dumps(tokens.tolist()),
        str(tmp_path / "store"),
        str(tmp_path / "out.pt"),
    ]
    done = subprocess.run([sys.executable, "-c", PLAIN_NEMO, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LlamaModel AutoTokenizer" in done.stdout
    with torch.no_grad():
        expected = llama(tmp_path / "student", architecture)(tokens).logits
    got = torch.load(tmp_path / "out.pt")
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_transformers(tiny, tmp_path):
    from nemo_minitron.config import LossConfig
    from nemo_minitron.data.samples import consecutive_sequences
    from nemo_minitron.evaluation.loss import evaluate_loss

    fields = tiny.training(tmp_path / "evaluation", restore_from_path=str(tiny.teacher))
    measured = evaluate_loss(LossConfig(**fields, limit_batches=2, splits=["test"])).metrics["test"]
    sequences = consecutive_sequences([str(tiny.data / "test")], 64, 16)
    model = llama(tiny.teacher, open_checkpoint(tiny.teacher).architecture).double()
    with torch.no_grad():
        logits = model(sequences[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    assert measured["tokens"] == sequences[:, 1:].numel()
    assert measured["loss"] == pytest.approx(float(expected), abs=2e-5)


def test_there_is_no_modelopt_state_in_a_student(tiny, tmp_path):
    from nemo_minitron.pruning.command import prune

    prune(tiny.pruning(tmp_path / "student", drop_layers=["2-3"]))
    assert not list((tmp_path / "student").rglob("modelopt_state*"))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.teacher, tmp_path / "copy"))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere", "teacher")
    with pytest.raises(CheckpointError, match="teacher .* no checkpoint"):
        open_checkpoint(tmp_path, "teacher")


def test_a_truncated_checkpoint_is_refused(copy):
    piece = max((copy / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    piece.write_bytes(piece.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{piece.name} is truncated"):
        open_checkpoint(copy)


def test_a_missing_piece_is_refused(copy):
    next((copy / "weights").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(copy)


@pytest.mark.parametrize("length", [0, 1, 100, 1000])
def test_truncated_metadata_is_refused(copy, length):
    path = copy / "weights" / ".metadata"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError):
        open_checkpoint(copy)


def test_a_pickle_that_calls_something_is_not_run(copy, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="was not run"):
        open_checkpoint(copy)
    assert not (tmp_path / "executed").exists()


def test_a_context_that_is_not_one_is_refused(copy):
    (copy / "context" / "io.json").write_text('{"objects": 3}')
    with pytest.raises(CheckpointError, match="not a NeMo-2 context"):
        open_checkpoint(copy)


def test_a_context_without_yaml_is_enough(copy, tiny):
    (copy / "context" / "model.yaml").unlink()
    assert open_checkpoint(copy).architecture == open_checkpoint(tiny.teacher).architecture


def test_tensors_are_listed_without_loading(tiny):
    listed = torch_dist.tensors(folder_files(tiny.teacher / WEIGHTS))
    stored = read_weights(tiny.teacher)
    assert {name: info.shape for name, info in listed.items()} == {n: tuple(t.shape) for n, t in stored.items()}
