"""ModelOpt's scores are what plain arithmetic on transformers' activations gives; and they are made once."""

import pytest
import torch

from hf import llama
from nemo_minitron.artifacts import ImportanceScores, Manifest
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.data.samples import random_sequences
from nemo_minitron.errors import ConfigError, OutputExistsError
from nemo_minitron.importance.scoring import score, scores_folder


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    config = tiny.pruning(tmp_path_factory.mktemp("scored") / "unused", num_layers=2)
    config.prune.scores_path = str(tmp_path_factory.mktemp("scored") / "scores")
    score(config)
    return config


def test_scores_equal_float64_arithmetic(tiny, scored):
    scores = ImportanceScores.load(scores_folder(scored))
    architecture = open_checkpoint(tiny.teacher).architecture
    model = llama(tiny.teacher, architecture).double()
    found = {"ffn": [], "heads": [], "hidden": []}

    def record(kind):
        # mean of absolute values over the sequence, squared, summed over samples
        return lambda module, args, output: found[kind].append(
            (output if kind == "hidden" else args[0]).abs().mean(dim=1).pow(2).sum(dim=0)
        )

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(record("hidden"))
        layer.post_attention_layernorm.register_forward_hook(record("hidden"))
        layer.self_attn.o_proj.register_forward_hook(record("heads"))
        layer.mlp.down_proj.register_forward_hook(record("ffn"))
    sequences, starts = random_sequences([str(tiny.data / "train")], 16, 64, scored.seed)
    with torch.no_grad():
        states = model(sequences[:, :-1], output_hidden_states=True).hidden_states
    for kind, values in found.items():
        assert torch.allclose(getattr(scores, kind).double(), torch.stack(values), rtol=1e-3, atol=1e-6), kind
    influence = []
    for before, after in zip(states[:-2], states[1:-1]):
        influence.append(sum(1 - torch.cosine_similarity(before[i], after[i], dim=-1).mean() for i in range(16)) / 8)
    assert torch.allclose(scores.block_influence[:-1], torch.stack(influence), rtol=1e-3)
    assert Manifest.read(scores_folder(scored)).details["sample_starts"] == starts


def test_samples_are_random_full_length_and_seeded(tiny):
    prefixes = [str(tiny.data / "train")]
    first, starts = random_sequences(prefixes, 32, 64, 5)
    again, same = random_sequences(prefixes, 32, 64, 5)
    other, _ = random_sequences(prefixes, 32, 64, 6)
    assert first.shape == (32, 65) and torch.equal(first, again) and starts == same
    assert not torch.equal(first, other) and len(set(starts)) == 32 and starts != sorted(starts)


def test_the_batch_size_of_calibration_does_not_matter(tiny, scored, tmp_path):
    config = tiny.pruning(tmp_path / "unused", num_layers=2, scores_path=str(tmp_path / "scores"))
    config.inference.batch_size = 2
    score(config)
    one, other = ImportanceScores.load(scores_folder(scored)), ImportanceScores.load(scores_folder(config))
    for name in ("hidden", "ffn", "heads"):
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-4)
    assert one.layers_by_importance() == other.layers_by_importance()


def test_two_pipeline_ranks_score_as_one(tiny, scored, tmp_path):
    config = tiny.pruning(tmp_path / "unused", num_layers=2, scores_path=str(tmp_path / "scores"))
    config.trainer.devices = config.model.pipeline_model_parallel_size = 2
    score(config)
    one, other = ImportanceScores.load(scores_folder(scored)), ImportanceScores.load(scores_folder(config))
    for name in ImportanceScores.names():
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-4), name


def test_a_second_prune_runs_no_forward_pass(tiny, scored, tmp_path, monkeypatch):
    from nemo_minitron import flow
    from nemo_minitron.runtime import ranks

    def refuse(*args, **kwargs):
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(ranks, "run_forward", refuse)
    config = tiny.pruning(tmp_path / "student", ffn_hidden_size=128, scores_path=scored.prune.scores_path)
    assert flow.prune(config).metrics["parameters"] < open_checkpoint(tiny.teacher).architecture.parameters()


def test_scores_of_another_teacher_are_refused(tiny, scored, tmp_path):
    from nemo_minitron import flow

    flow.prune(tiny.pruning(tmp_path / "other", drop_layers=[1]))
    config = tiny.pruning(
        tmp_path / "student", teacher=tmp_path / "other", ffn_hidden_size=128, scores_path=scored.prune.scores_path
    )
    with pytest.raises(OutputExistsError, match="another teacher"):
        flow.prune(config)


def test_scoring_without_data_is_refused(tiny, tmp_path):
    config = tiny.pruning(tmp_path / "student", num_layers=2)
    config.model.data.data_prefix = None
    with pytest.raises(ConfigError, match="data_prefix"):
        score(config)
