"""Losses on hidden states: their values, what they train, and where they are refused."""

import pytest
import torch

from hf import llama, read_weights
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config import DistillConfig, HiddenLossConfig, KDConfig
from nemo_minitron.distillation.command import distill
from nemo_minitron.errors import ConfigError
from nemo_minitron.pruning.command import prune


@pytest.fixture(scope="module")
def students(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    prune(tiny.pruning(root / "depth", drop_layers=[3]))
    prune(tiny.pruning(root / "width", hidden_size=96))
    return root


def run(tiny, student, output, steps=1, devices=1, form="auto", layout=None, **hidden):
    fields = tiny.training(
        output,
        steps,
        restore_from_path=str(student),
        kd_teacher_restore_from_path=str(tiny.teacher),
        **(layout or {}),
    )
    fields["trainer"].devices = devices
    return distill(DistillConfig(**fields, kd=KDConfig(form=form, hidden=HiddenLossConfig(**hidden))))


@pytest.fixture(scope="module")
def first_batch(tiny, students, tmp_path_factory):
    """The tokens and mask of the first step, as NeMo's data module gave them."""
    from nemo_minitron.distillation import attach

    seen, original = [], attach.with_hidden

    def spy(losses, hidden, mask, config):
        seen.append(mask.clone())
        return original(losses, hidden, mask, config)

    from nemo_minitron.megatron import session as engine

    tokens, step = [], engine.forward_step

    def recorded(model, batch):
        tokens.append(batch["tokens"].clone())
        return step(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "with_hidden", spy)
        patch.setattr(engine, "forward_step", recorded)
        run(tiny, students / "depth", tmp_path_factory.mktemp("spied") / "kd", weight=1.0)
    return torch.cat(tokens[:2]), torch.cat(seen[:2]).double()


def states(path, tokens) -> list[torch.Tensor]:
    """Embeddings and each block's output [b, s, h], by transformers in float64."""
    model = llama(path, open_checkpoint(path).architecture).double()
    outputs = []
    for module in (model.model.embed_tokens, *model.model.layers):
        module.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(tokens)
    return outputs


@pytest.mark.parametrize("form", ["fused", "chunked"])
@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_they_equal_float64_arithmetic(tiny, students, first_batch, tmp_path, loss, form):
    """Layer 3 of 4 was dropped: auto pairs 1-1, 2-2 and 3-4, as the student's manifest says."""
    tokens, mask = first_batch
    manifest = run(tiny, students / "depth", tmp_path / "kd", form=form, loss=loss, pairs="auto", weight=0.5)
    first = manifest.metrics["train"][0]
    own, other = states(students / "depth", tokens), states(tiny.teacher, tokens)
    assert {name for name in first if name.startswith(loss)} == {f"{loss}_1-1", f"{loss}_2-2", f"{loss}_3-4"}
    for student, teacher in ((1, 1), (2, 2), (3, 4)):
        one, two = own[student], other[teacher]
        if loss == "mse":
            expected = ((one - two) ** 2).mean(-1)
        else:
            expected = 1 - (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))
        mean = float((expected * mask).sum() / mask.sum())
        assert first[f"{loss}_{student}-{teacher}"] == pytest.approx(mean, abs=2e-6, rel=1e-4)
    assert manifest.metrics["weights"][f"{loss}_3-4"] == pytest.approx(0.5 / 3)


def test_both_forms_train_alike(tiny, students, tmp_path):
    options = {"pairs": [[0, 0], [2, 2], [3, 4]], "weight": 2.0, "scale": "dynamic"}
    for form in ("fused", "chunked"):
        run(tiny, students / "depth", tmp_path / form, steps=3, form=form, **options)
    one, other = read_weights(tmp_path / "fused"), read_weights(tmp_path / "chunked")
    assert all(torch.allclose(other[name], value, atol=2e-4) for name, value in one.items())
    run(tiny, students / "depth", tmp_path / "without", steps=3)
    assert any(
        not torch.allclose(value, one[name], atol=2e-4) for name, value in read_weights(tmp_path / "without").items()
    )


def test_a_projection_where_widths_differ_is_trained_resumed_and_left_out(tiny, students, tmp_path, monkeypatch):
    manifest = run(tiny, students / "width", tmp_path / "kd", steps=12, weight=1.0)
    train = manifest.metrics["train"]
    assert train[-1]["cosine_4-4"] < 0.8 * train[0]["cosine_4-4"]
    assert read_weights(tmp_path / "kd").keys() == read_weights(students / "width").keys()

    from nemo_minitron.training import history

    end = history.History.on_train_batch_end

    def stopped(self, trainer, *arguments):
        end(self, trainer, *arguments)
        if trainer.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history.History, "on_train_batch_end", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tiny, students / "width", tmp_path / "stopped", steps=12, weight=1.0)
    resumed = run(tiny, students / "width", tmp_path / "stopped", steps=12, weight=1.0)
    assert resumed.metrics == manifest.metrics
    whole = read_weights(tmp_path / "kd")
    assert all(torch.equal(whole[name], value) for name, value in read_weights(tmp_path / "stopped").items())


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["data", "tensor"])
def test_two_ranks_equal_one(tiny, students, tmp_path, layout):
    """Real gloo ranks, losses on logits and on hidden states."""
    options = {"steps": 2, "weight": 1.0, "scale": "dynamic"}
    one = run(tiny, students / "width", tmp_path / "one", **options)
    two = run(tiny, students / "width", tmp_path / "two", devices=2, layout=layout, **options)
    for split in ("train", "validation"):
        for expected, got in zip(one.metrics[split], two.metrics[split], strict=True):
            assert got == pytest.approx(expected, abs=2e-4)
    weights, other = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert weights.keys() == other.keys()
    assert open_checkpoint(tmp_path / "two").architecture == open_checkpoint(tmp_path / "one").architecture
    assert all(torch.allclose(other[name], value, atol=5e-4) for name, value in weights.items())


def test_the_dynamic_scale_makes_them_as_large_as_the_loss_on_logits(tiny, students, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    manifest = run(tiny, students / "depth", tmp_path / "kd", weight=0.25, scale="dynamic")
    first = manifest.metrics["train"][0]
    events = EventAccumulator(str(tmp_path / "kd" / "tensorboard")).Reload()
    names = [name for name in first if name.startswith("cosine")]
    weighed = sum(events.Scalars(f"weight/{name}")[0].value * first[name] for name in names)
    assert len(names) == 2 and weighed == pytest.approx(0.25 * first["kd_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("hidden", "layout", "message"),
    [
        ({"weight": 1.0}, {"pipeline_model_parallel_size": 2}, "needs model.pipeline_model_parallel_size=1"),
        ({"weight": 1.0, "pairs": [[9, 1]]}, {}, "the student has no layer 9"),
        ({"weight": 1.0, "pairs": "all"}, {}, "pairs = 'all' must be outer, auto, or a list"),
        ({"weight": -1.0}, {}, "weight = -1.0 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(tiny, students, tmp_path, hidden, layout, message):
    from nemo_minitron.config import validated

    fields = tiny.training(
        tmp_path / "kd",
        1,
        restore_from_path=str(students / "depth"),
        kd_teacher_restore_from_path=str(tiny.teacher),
        **layout,
    )
    fields["trainer"].devices = 2 if layout else 1
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        distill(validated(DistillConfig(**fields, kd=KDConfig(hidden=HiddenLossConfig(**hidden)))))
    assert not (tmp_path / "kd").exists()
