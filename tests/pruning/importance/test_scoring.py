"""ModelOpt's scores are what plain arithmetic on transformers' activations gives; and they are made once."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from activations import moments
from hf import llama
from nemo_minitron import config as c
from nemo_minitron.artifacts import ImportanceScores, Manifest
from nemo_minitron.artifacts.scores import TensorFile, save_tensors
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.conversion.convert import convert
from nemo_minitron.data.samples import random_sequences
from nemo_minitron.errors import ConfigError, MinitronError, OutputExistsError
from nemo_minitron.pruning.command import prune
from nemo_minitron.pruning.importance import scoring
from nemo_minitron.pruning.importance.moments import MomentSums
from nemo_minitron.pruning.importance.scoring import score, scores_folder, singular


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
    assert scores.samples == Manifest.read(scores_folder(scored)).details["samples"]
    assert scores.samples["starts"] == starts and scores.samples["tokens"] == 16 * 64


def test_our_estimators_are_modelopts_bit_for_bit(tiny, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "modelopt_takes_local_layers", lambda: False)
    config = tiny.pruning(tmp_path / "unused", num_layers=2, scores_path=str(tmp_path / "scores"))
    score(config)
    one, other = ImportanceScores.load(scores_folder(scored)), ImportanceScores.load(scores_folder(config))
    for name in ImportanceScores.names():
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(one.moments[name], other.moments[name]) for name in one.moments)


def test_a_log_says_how_far_scoring_is(tiny, tmp_path, capfd):
    config = tiny.pruning(tmp_path / "unused", num_layers=2, scores_path=str(tmp_path / "scores"))
    config.inference.batch_size = 3
    config.trainer.log_every_n_steps = 2
    score(config)
    found = [line for line in capfd.readouterr().err.splitlines() if line.startswith("importance: ")]
    pattern = r"importance: sample (\d+) of 16, [\d,]+ tokens/s, 0:\d\d left"
    assert [int(re.fullmatch(pattern, line)[1]) for line in found] == [3, 6, 12, 16]


def test_moments_equal_float64_arithmetic(tiny, scored):
    found = ImportanceScores.load(scores_folder(scored)).moments
    architecture = open_checkpoint(tiny.teacher).architecture
    model = llama(tiny.teacher, architecture).double()
    sequences, _ = random_sequences([str(tiny.data / "train")], 16, 64, scored.seed)
    expected = moments(model, sequences[:, :-1], centred=False, epsilon=architecture.layernorm_epsilon)
    assert found.keys() == expected.keys() and len(found) == 4 * 4 + 1
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm(), name


def test_moments_of_parts_add_up():
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * 1e3
    sums = MomentSums()
    for part in rows.split(7):
        sums.add("ffn.0", part)
    assert torch.allclose(sums.means()["ffn.0"].double(), rows.double().T @ rows.double() / 100, rtol=1e-5)
    sums.add("stream.5", torch.full((1, 8), float("nan")))
    with pytest.raises(MinitronError, match=r"layer 3: the norm input .* not finite"):
        sums.means()


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


@pytest.mark.usefixtures("forked_ranks")
def test_two_pipeline_ranks_score_as_one(tiny, scored, tmp_path):
    config = tiny.pruning(tmp_path / "unused", num_layers=2, scores_path=str(tmp_path / "scores"))
    config.trainer.devices = config.model.pipeline_model_parallel_size = 2
    score(config)
    one, other = ImportanceScores.load(scores_folder(scored)), ImportanceScores.load(scores_folder(config))
    for name in ImportanceScores.names():
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-4), name
    assert one.moments.keys() == other.moments.keys() and one.samples == other.samples
    for name in one.moments:
        assert torch.allclose(one.moments[name], other.moments[name], rtol=1e-3, atol=1e-5), name
    assert {path.name for path in scores_folder(config).iterdir()} == {"scores.safetensors", "manifest.json", "logs"}


def test_a_second_prune_runs_no_forward_pass(tiny, scored, tmp_path, monkeypatch):
    from nemo_minitron.megatron import forward

    def refuse(*args, **kwargs):
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(forward, "run_forward", refuse)
    config = tiny.pruning(tmp_path / "student", ffn_hidden_size=128, scores_path=scored.prune.scores_path)
    assert prune(config).metrics["parameters"] < open_checkpoint(tiny.teacher).architecture.parameters()


def test_scores_of_another_teacher_are_refused(tiny, scored, tmp_path):
    prune(tiny.pruning(tmp_path / "other", drop_layers=[1]))
    config = tiny.pruning(
        tmp_path / "student", teacher=tmp_path / "other", ffn_hidden_size=128, scores_path=scored.prune.scores_path
    )
    with pytest.raises(OutputExistsError, match="another teacher"):
        prune(config)


def test_scores_are_refused_for_another_teacher_of_the_same_shape(tiny, scored, tmp_path):
    """No data is named, so the scores are taken as given; what they were made of is in the file."""
    weights = {name: tensor.read() for name, tensor in open_checkpoint(tiny.teacher).tensors.items()}
    weights["decoder.final_layernorm.weight"] += 1.0
    architecture = open_checkpoint(tiny.teacher).architecture
    write_checkpoint(tmp_path / "other", "hf", architecture, {k: in_memory(v) for k, v in weights.items()}, None, {})
    for teacher, fits in ((tiny.teacher, True), (tmp_path / "other", False)):
        config = tiny.pruning(tmp_path / f"student-{fits}", teacher=teacher, ffn_hidden_size=128)
        config.prune.scores_path, config.model.data.data_prefix = scored.prune.scores_path, None
        if fits:
            assert prune(config).metrics["parameters"] < architecture.parameters()
        else:
            with pytest.raises(MinitronError, match="scores of another teacher"):
                prune(config)


def test_the_same_weights_in_another_format_take_the_same_scores(tiny, scored, tmp_path):
    convert(c.ConvertConfig(source=str(tiny.teacher), output=str(tmp_path / "t.nemo"), verify="none"))
    for teacher in (tiny.teacher, tmp_path / "t.nemo"):
        config = tiny.pruning(tmp_path / f"{teacher.name}-student", teacher=teacher, ffn_hidden_size=128)
        config.prune.scores_path, config.model.data.data_prefix = scored.prune.scores_path, None
        prune(config)
    one, other = (open_checkpoint(tmp_path / f"{name}-student") for name in ("teacher", "t.nemo"))
    assert all(torch.equal(tensor.read(), other.tensors[name].read()) for name, tensor in one.tensors.items())


def damaged(path, change):
    """A copy of scores, changed."""
    shutil.copytree(path.parent, change["to"])
    target = change["to"] / path.name
    if "bytes" in change:
        target.write_bytes(path.read_bytes()[: change["bytes"]])
    else:
        tensors = load_file(path)
        tensors[change["tensor"]].view(-1)[3] = float("nan")
        meta = TensorFile(path).meta
        save_tensors(target, tensors, meta)
    return change["to"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes": 100_000}, "cannot be read"),
        ({"bytes": 4}, "cannot be read"),
        ({"tensor": "ffn"}, "ffn holds values that are not finite"),
        ({"tensor": "moments.ffn.2"}, "moments.ffn.2 holds values that are not finite"),
    ],
)
def test_damaged_scores_are_refused_by_name(tiny, scored, tmp_path, change, message):
    folder = damaged(Path(scored.prune.scores_path) / "scores.safetensors", {**change, "to": tmp_path / "scores"})
    config = tiny.pruning(tmp_path / "student", ffn_hidden_size=128, method="compensated", scores_path=str(folder))
    config.model.data.data_prefix = None
    with pytest.raises(MinitronError, match=message):
        prune(config)
    assert not (tmp_path / "student").exists()


def test_scores_without_moments_are_refused_for_the_compensated_cut(tiny, tmp_path):
    config = tiny.pruning(tmp_path / "student", ffn_hidden_size=128, statistics=False, method="compensated")
    config.prune.scores_path = str(tmp_path / "scores")
    with pytest.raises(MinitronError, match="no second moments"):
        prune(config)
    config.prune.method = "minitron"
    prune(config)


def test_fewer_tokens_than_channels_is_said(tiny):
    a = open_checkpoint(tiny.teacher).architecture
    assert singular(a, 10_000) is None
    message = singular(a, 200)
    assert "200 calibration tokens for 256 FFN neurons" in message and "num_samples" in message


def test_a_teacher_that_overflows_is_named_by_layer(tiny, tmp_path):
    weights = {name: tensor.read() for name, tensor in open_checkpoint(tiny.teacher).tensors.items()}
    weights["decoder.layers.2.mlp.linear_fc2.weight"][0, 0] = float("inf")
    architecture = open_checkpoint(tiny.teacher).architecture
    write_checkpoint(tmp_path / "bad", "nemo2", architecture, {k: in_memory(v) for k, v in weights.items()}, None, {})
    with pytest.raises(MinitronError, match=r"layer 4: .* not finite"):
        score(tiny.pruning(tmp_path / "student", teacher=tmp_path / "bad", ffn_hidden_size=128))
    assert not (tmp_path / "bad.scores").exists()


def test_scoring_without_data_is_refused(tiny, tmp_path):
    config = tiny.pruning(tmp_path / "student", num_layers=2, scores_path=str(tmp_path / "not-there"))
    config.model.data.data_prefix = None
    with pytest.raises(ConfigError, match="data_prefix"):
        score(config)
