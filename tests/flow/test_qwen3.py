"""A Qwen 3 with heads of their own size goes the whole way: correction, scores, both cuts, refit, distillation."""

import pytest
import torch

from models import build
from nemo_minitron import config as c
from nemo_minitron.artifacts import ImportanceScores
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.formats.nemo2.engine import nemo_model
from nemo_minitron.checkpoints.names import LAYERS, QK_NORMS
from nemo_minitron.cli.main import main
from nemo_minitron.data.samples import random_sequences
from nemo_minitron.distillation.command import distill
from nemo_minitron.errors import ConfigError
from nemo_minitron.pruning.command import prune
from nemo_minitron.pruning.importance.scoring import scores_folder
from nemo_minitron.training.finetune import finetune

STEPS = 60
WIDTH = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 2}
GRID = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 16}


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """As transformers saves it, trained on the shared text."""
    folder = tmp_path_factory.mktemp("qwen3")
    build("qwen3", torch.float32, vocab_size=512).save_pretrained(folder / "start")
    fields = tiny.training(folder / "teacher", STEPS, restore_from_path=str(folder / "start"))
    fields["model"].data.tokenizer = str(tiny.data / "tokenizer")
    manifest = finetune(c.FinetuneConfig(**fields, to="hf"))
    return folder / "start", folder / "teacher", manifest


def loaded(folder, dtype=torch.float64):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype).eval()


def loss(model, tokens) -> float:
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def gains(folder) -> list[torch.Tensor]:
    """Of the norms of queries and keys, layer by layer."""
    tensors = open_checkpoint(folder).tensors
    return [tensors[f"{LAYERS}{layer}.{norm}.weight"].read() for layer in range(2) for norm in QK_NORMS]


def test_training_changes_the_norms_of_queries_and_keys_and_transformers_has_its_loss(tiny, teacher):
    start, trained, manifest = teacher
    losses = [entry["lm_loss"] for entry in manifest.metrics["train"]]
    assert losses[-1] < losses[0] - 1.0
    held_out, _ = random_sequences([str(tiny.data / "validation")], 16, 64, 7)
    assert loss(loaded(trained), held_out) < loss(loaded(start), held_out) - 1.0
    assert not any(torch.equal(before, after) for before, after in zip(gains(start), gains(trained)))


def test_both_cuts_keep_the_gains_and_the_refitted_one_loses_less(tiny, teacher, tmp_path):
    _, trained, _ = teacher
    held_out, _ = random_sequences([str(tiny.data / "validation")], 16, 64, 7)
    lost = {}
    for name, targets in {
        "published": {"method": "minitron"},
        "once": {"method": "compensated", "refit": "once"},
        "sequential": {"method": "compensated", "refit": "sequential"},
    }.items():
        config = tiny.pruning(tmp_path / name, trained, **GRID, **WIDTH, **targets, num_block_samples=32)
        config.prune.scores_path, config.to = str(tmp_path / "scores"), "hf"
        prune(config)
        lost[name] = loss(loaded(tmp_path / name), held_out)
        assert all(torch.equal(before, after) for before, after in zip(gains(trained), gains(tmp_path / name)))
    assert lost["sequential"] < lost["once"] < lost["published"]
    check_scores(ImportanceScores.load(scores_folder(config)), tiny, trained, config)
    student = {"restore_from_path": str(tmp_path / "once"), "kd_teacher_restore_from_path": str(trained)}
    distilled = distill(c.DistillConfig(**tiny.training(tmp_path / "distilled", STEPS // 2, **student), to="hf"))
    losses = [entry["kd_loss"] for entry in distilled.metrics["train"]]
    assert losses[-1] < 0.8 * losses[0]
    assert loss(loaded(tmp_path / "distilled"), held_out) < lost["once"]


def check_scores(scores, tiny, trained, config) -> None:
    """Mean magnitude over the sequence, L2 over samples, of what linear_proj reads, by transformers in float64."""
    model, found = loaded(trained), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: found.append(args[0]))
    sequences, _ = random_sequences([str(tiny.data / "train")], 16, 64, config.seed)
    with torch.no_grad():
        model(sequences[:, :-1])
    expected = torch.stack([heads.abs().mean(dim=1).pow(2).sum(dim=0) for heads in found])
    assert torch.allclose(scores.heads.double(), expected, rtol=1e-3, atol=1e-6)


def test_a_refitted_cut_in_depth_drops_the_layer_whose_loss_costs_least(tiny, teacher, tmp_path):
    _, trained, _ = teacher
    held_out, _ = random_sequences([str(tiny.data / "validation")], 16, 64, 7)
    depth = {"method": "compensated", "refit": "once", "num_block_samples": 32}
    lost = {}
    for name, targets in {
        "chosen": {"num_layers": 1, "depth_by": "compensated_loss"},
        "first": {"drop_layers": [1]},
        "second": {"drop_layers": [2]},
    }.items():
        config = tiny.pruning(tmp_path / name, trained, **{**GRID, **depth, **targets})
        config.prune.scores_path, config.to = str(tmp_path / "scores"), "hf"
        prune(config)
        lost[name] = loss(loaded(tmp_path / name), held_out)
    assert abs(lost["first"] - lost["second"]) > 0.05
    assert lost["chosen"] == pytest.approx(min(lost["first"], lost["second"]), abs=1e-6)


def test_nemos_connectors_cut_it_and_take_it_out(tiny, teacher, tmp_path):
    from nemo.collections import llm

    import nemo_minitron.integrations.connectors  # noqa: F401

    model = nemo_model(open_checkpoint(teacher[1]).architecture)
    assert isinstance(model, llm.Qwen3Model)
    start = llm.import_ckpt(model, f"hf://{teacher[1]}", output_path=tmp_path / "start", verify="tensors")
    student = llm.import_ckpt(
        model, f"minitron-depth://{start}", output_path=tmp_path / "student", drop_layers=[1], method="minitron"
    )
    out = llm.export_ckpt(student, "hf", output_path=tmp_path / "out", verify="none")
    assert loaded(out).config.num_hidden_layers == 1
    kept, cut = open_checkpoint(teacher[1]).tensors, open_checkpoint(out).tensors
    for name, tensor in cut.items():
        assert torch.equal(tensor.read(), kept[name.replace(f"{LAYERS}0.", f"{LAYERS}1.")].read()), name


def test_a_presets_flow_takes_a_smaller_model_of_the_family(tmp_path, capsys):
    """`minitron flow model=qwen3_0.6b` with the teacher and the students' sizes put in, as a dry run."""
    build("qwen3", torch.float32).save_pretrained(tmp_path / "teacher")
    students = ["num_layers_divisor=1", "students.depth.num_layers=1", "students.width.hidden_size=48",
                "students.width.ffn_hidden_size=64"]  # fmt: skip
    command = ["flow", "model=qwen3_0.6b", f"model.restore_from_path={tmp_path / 'teacher'}", "dry_run=true"]
    assert main([*command, *(f"prune.{student}" for student in students), f"output_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "depth     qwen3, 1 layers, hidden 64, FFN 96, heads 4/2 of 24" in said
    assert "width     qwen3, 2 layers, hidden 48, FFN 64, heads 4/2 of 24" in said
    assert not (tmp_path / "run").exists()


def test_merged_heads_are_refused_by_what_they_lose(tiny, teacher, tmp_path):
    targets = {"method": "compensated", "merge_heads": True, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match="merge_heads: this model normalises each query after linear_qkv"):
        prune(tiny.pruning(tmp_path / "student", teacher[1], **GRID, **targets))
    assert not (tmp_path / "student").exists()
