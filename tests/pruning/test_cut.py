"""The cut: what is kept is the teacher's own, chosen by the scores; what cannot be cut is refused before any work."""

import pytest
import torch

from hf import read_weights
from nemo_minitron.artifacts import ImportanceScores, Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.errors import ConfigError, OutputExistsError
from nemo_minitron.pruning.command import prune
from nemo_minitron.pruning.importance.scoring import scores_folder

LAYER = "module.decoder.layers."
FC1, FC2 = f"{LAYER}mlp.linear_fc1.weight", f"{LAYER}mlp.linear_fc2.weight"
QKV, PROJ = f"{LAYER}self_attention.linear_qkv.weight", f"{LAYER}self_attention.linear_proj.weight"


@pytest.fixture(scope="module")
def scores_path(tiny, tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cut") / "scores")


def test_given_layers_go_and_the_rest_is_bit_exact(tiny, tmp_path):
    manifest = prune(tiny.pruning(tmp_path / "student", drop_layers=["2-3"]))
    teacher, student = read_weights(tiny.teacher), read_weights(tmp_path / "student")
    for name, tensor in teacher.items():
        expected = tensor[[0, 3]] if name.startswith(LAYER) else tensor
        assert torch.equal(student[name], expected), name
    assert manifest.metrics["dropped_layers"] == [2, 3]
    assert manifest.metrics["parameters"] == sum(tensor.numel() for tensor in student.values())


def test_depth_by_importance_drops_the_layers_of_least_influence(tiny, tmp_path, scores_path):
    config = tiny.pruning(tmp_path / "student", num_layers=2, scores_path=scores_path)
    manifest = prune(config)
    influence = ImportanceScores.load(scores_folder(config)).block_influence
    assert manifest.metrics["dropped_layers"] == sorted(int(i) + 1 for i in influence.argsort()[:2])


def test_ffn_neurons_kept_are_the_top_ones_in_order(tiny, tmp_path, scores_path):
    config = tiny.pruning(tmp_path / "student", ffn_hidden_size=128, scores_path=scores_path)
    prune(config)
    scores = ImportanceScores.load(scores_folder(config))
    teacher, student = read_weights(tiny.teacher), read_weights(tmp_path / "student")
    for layer in range(4):
        kept = scores.ffn[layer].sqrt().argsort(descending=True)[:128]
        gate, up = teacher[FC1][layer].chunk(2)
        assert torch.equal(student[FC1][layer], torch.cat([gate[kept], up[kept]]))
        assert torch.equal(student[FC2][layer], teacher[FC2][layer][:, kept])


def test_hidden_channels_kept_are_the_top_ones_everywhere(tiny, tmp_path, scores_path):
    config = tiny.pruning(tmp_path / "student", hidden_size=64, scores_path=scores_path)
    prune(config)
    kept = ImportanceScores.load(scores_folder(config)).hidden.sqrt().sum(dim=0).argsort(descending=True)[:64]
    teacher, student = read_weights(tiny.teacher), read_weights(tmp_path / "student")
    assert torch.equal(student[QKV], teacher[QKV][:, :, kept])
    assert torch.equal(student[PROJ], teacher[PROJ][:, kept])
    assert torch.equal(student[FC2], teacher[FC2][:, kept])
    for name in ("module.embedding.word_embeddings.weight", "module.output_layer.weight"):
        assert torch.equal(student[name], teacher[name][:, kept])
    assert open_checkpoint(tmp_path / "student").architecture.kv_channels == 32


def test_heads_are_kept_within_their_query_group(tiny, tmp_path, scores_path):
    config = tiny.pruning(tmp_path / "student", num_attention_heads=2, scores_path=scores_path)
    prune(config)
    head = ImportanceScores.load(scores_folder(config)).heads.sqrt().view(4, 4, 32).norm(dim=2)
    teacher, student = read_weights(tiny.teacher), read_weights(tmp_path / "student")
    for layer in range(4):
        best = [group * 2 + int(head[layer].view(2, 2)[group].argmax()) for group in range(2)]
        columns = torch.cat([torch.arange(index * 32, index * 32 + 32) for index in best])
        assert torch.equal(student[PROJ][layer], teacher[PROJ][layer][:, columns])
    assert open_checkpoint(tmp_path / "student").architecture.num_attention_heads == 2


def test_depth_and_width_together(tiny, tmp_path, scores_path):
    targets = {"drop_layers": [4], "hidden_size": 96, "ffn_hidden_size": 192}
    prune(tiny.pruning(tmp_path / "student", scores_path=scores_path, **targets))
    architecture = open_checkpoint(tmp_path / "student").architecture
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (3, 96, 192)
    shapes = {tuple(tensor.shape) for name, tensor in read_weights(tmp_path / "student").items() if name == FC1}
    assert shapes == {(3, 2 * 192, 96)}


def test_all_problems_come_at_once_and_nothing_is_written(tiny, tmp_path):
    config = tiny.pruning(
        tmp_path / "student", hidden_size=100, ffn_hidden_size=512, num_attention_heads=3, drop_layers=[0, 2, 2, 9]
    )
    with pytest.raises(ConfigError) as caught:
        prune(config)
    message = str(caught.value)
    for part in (
        "hidden_size 100",
        "nearest 96 and 128",
        "512 is above",
        "num_attention_heads 3",
        "[0, 9]",
        "[2] dropped",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_kept(tiny, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="overwrite=true"):
        prune(tiny.pruning(tmp_path / "student", drop_layers=[1]))
    assert (tmp_path / "student" / "mine.txt").read_text() == "mine"


def test_the_same_cut_again_does_nothing(tiny, tmp_path):
    first = prune(tiny.pruning(tmp_path / "student", drop_layers=[1]))
    stamp = (tmp_path / "student" / "manifest.json").stat().st_mtime_ns
    assert prune(tiny.pruning(tmp_path / "student", drop_layers=[1])) == first
    assert (tmp_path / "student" / "manifest.json").stat().st_mtime_ns == stamp
    assert Manifest.read(tmp_path / "student").inputs["teacher"]["path"] == str(tiny.teacher)
