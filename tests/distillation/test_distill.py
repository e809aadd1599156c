"""Distillation: its losses against float64 arithmetic, resuming, and two ranks against one."""

import pytest
import torch

from hf import llama, read_weights
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config import DistillConfig, KDConfig
from nemo_minitron.distillation.command import distill
from nemo_minitron.errors import ConfigError, NonFiniteLossError
from nemo_minitron.pruning.command import prune


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("students") / "student"
    prune(tiny.pruning(path, hidden_size=96, ffn_hidden_size=192, drop_layers=[3]))
    return path


def config(tiny, student, output, steps=4, kd=None, **model) -> DistillConfig:
    fields = tiny.training(
        output, steps, restore_from_path=str(student), kd_teacher_restore_from_path=str(tiny.teacher), **model
    )
    return DistillConfig(**fields, kd=kd or KDConfig())


def test_self_distillation_has_no_loss(tiny, tmp_path):
    manifest = distill(config(tiny, tiny.teacher, tmp_path / "self", steps=1))
    assert manifest.metrics["train"][0]["kd_loss"] == pytest.approx(0.0, abs=1e-6)


def test_both_losses_equal_float64_arithmetic(tiny, student, tmp_path, monkeypatch):
    """The first step's losses, on the batch that NeMo's data module gave."""
    from nemo_minitron.training import losses

    batches = []
    make = losses.token_loss_reduction

    def spy(names, weights, per_token, sink):
        def recorded(batch, output):
            batches.append({name: batch[name].clone() for name in ("tokens", "labels", "loss_mask")})
            return per_token(batch, output)

        return make(names, weights, recorded, sink)

    monkeypatch.setattr("nemo_minitron.training.losses.token_loss_reduction", spy)
    kd = KDConfig(temperature=2.0, kd_weight=1.0, lm_weight=0.5)
    first = distill(config(tiny, student, tmp_path / "kd", steps=1, kd=kd)).metrics["train"][0]
    batch = {name: torch.cat([entry[name] for entry in batches[:2]]) for name in batches[0]}
    with torch.no_grad():
        logits = {
            name: llama(path, open_checkpoint(path).architecture).double()(batch["tokens"]).logits
            for name, path in (("teacher", tiny.teacher), ("student", student))
        }
    teacher = (logits["teacher"] / 2.0).log_softmax(-1)
    kl = (teacher.exp() * (teacher - (logits["student"] / 2.0).log_softmax(-1))).sum(-1)
    lm = torch.nn.functional.cross_entropy(logits["student"].flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].double()
    assert first["kd_loss"] == pytest.approx(float((kl * mask).sum() / mask.sum()), abs=1e-5)
    assert first["lm_loss"] == pytest.approx(float((lm * mask.flatten()).sum() / mask.sum()), abs=1e-5)


@pytest.mark.parametrize(
    "kd",
    [{}, {"temperature": 2.0, "times_t_squared": True, "lm_weight": 0.5}, {"loss": "jensen_shannon", "beta": 0.3}],
    ids=["default", "mixed", "jsd"],
)
def test_the_fused_form_trains_as_the_one_on_logits(tiny, student, tmp_path, kd):
    manifests = {
        form: distill(config(tiny, student, tmp_path / form, steps=3, kd=KDConfig(form=form, **kd)))
        for form in ("fused", "chunked")
    }
    for one, other in zip(manifests["fused"].metrics["train"], manifests["chunked"].metrics["train"]):
        assert one == pytest.approx(other, abs=2e-5)
    assert manifests["fused"].metrics["validation"][-1] == pytest.approx(
        manifests["chunked"].metrics["validation"][-1], abs=2e-5
    )
    one, other = read_weights(tmp_path / "fused"), read_weights(tmp_path / "chunked")
    assert all(torch.allclose(other[name], value, atol=2e-4) for name, value in one.items())


def test_all_of_the_vocabulary_as_top_k_is_the_plain_loss(tiny, student, tmp_path):
    plain, every, few = (
        distill(config(tiny, student, tmp_path / str(k), steps=1, kd=KDConfig(form="chunked", top_k=k)))
        for k in (None, 512, 8)
    )
    losses = [manifest.metrics["train"][0]["kd_loss"] for manifest in (plain, every, few)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and abs(losses[2] - losses[0]) > 1e-3


def test_fixed_windows_are_what_is_trained_on(tiny, student, tmp_path):
    """Two passes over a corpus of few windows: the loss a step is that of the windows in the order of the seed."""
    settings = config(tiny, student, tmp_path / "kd", steps=1)
    settings.model.data.windows = "fixed"
    manifest = distill(settings)
    from nemo_minitron.data.sample_sets import Passes, Windows

    windows = Windows([f"{settings.model.data.data_prefix}/train"], settings.model.data.seq_length)
    order = Passes(len(windows), settings.seed)
    ids = torch.stack(
        [torch.as_tensor(windows[order[number]][0].ids) for number in range(settings.model.global_batch_size)]
    )
    with torch.no_grad():
        logits = llama(student, open_checkpoint(student).architecture).double()(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert manifest.metrics["train"][0]["lm_loss"] == pytest.approx(float(loss), abs=1e-5)


def test_distilling_brings_the_student_closer(tiny, student, tmp_path):
    validation = distill(config(tiny, student, tmp_path / "kd", steps=20)).metrics["validation"]
    first = distill(config(tiny, student, tmp_path / "start", steps=1)).metrics["train"][0]
    assert validation[-1]["kd_loss"] < 0.7 * first["kd_loss"]


def test_losses_are_on_tensorboard(tiny, student, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    manifest = distill(config(tiny, student, tmp_path / "kd", steps=4))
    events = EventAccumulator(str(tmp_path / "kd" / "tensorboard")).Reload()
    for split in ("train", "validation"):
        for name in ("kd_loss", "lm_loss"):
            last = events.Scalars(f"{split}/{name}")[-1]
            recorded = {entry["step"]: entry[name] for entry in manifest.metrics[split]}
            assert last.value == pytest.approx(recorded[last.step], rel=1e-6)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tiny, student, tmp_path, monkeypatch):
    whole = distill(config(tiny, student, tmp_path / "whole", steps=6))
    from nemo_minitron.training import loop as training

    stop = training.history_callback

    def stopping(*arguments):
        history = stop(*arguments)
        end = history.on_train_batch_end

        def on_train_batch_end(trainer, *rest):
            end(trainer, *rest)
            if trainer.global_step == 5:
                raise KeyboardInterrupt

        history.on_train_batch_end = on_train_batch_end
        return history

    with monkeypatch.context() as patch:
        patch.setattr(training, "history_callback", stopping)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            distill(config(tiny, student, tmp_path / "stopped", steps=6))
    assert not (tmp_path / "stopped").exists()
    assert training.newest_checkpoint(tmp_path / ".stopped.partial" / "checkpoints").endswith("step-3")
    resumed = distill(config(tiny, student, tmp_path / "stopped", steps=6))
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert resumed.metrics["train"] == whole.metrics["train"]
    assert resumed.metrics["validation"] == whole.metrics["validation"]


def test_a_repeat_gives_the_same_bits(tiny, student, tmp_path):
    for name in ("one", "two"):
        distill(config(tiny, student, tmp_path / name, steps=3))
    assert same_weights(tmp_path / "one", tmp_path / "two")


def test_the_control_needs_no_teacher(tiny, student, tmp_path):
    fields = tiny.training(tmp_path / "control", 2, restore_from_path=str(student))
    manifest = distill(DistillConfig(**fields, kd=KDConfig(kd_weight=0.0, lm_weight=1.0)))
    assert set(manifest.metrics["train"][0]) == {"step", "lm_loss", "lr"}


def test_a_loss_that_is_not_finite_stops_the_run(tiny, student, tmp_path):
    exploding = config(tiny, student, tmp_path / "kd", steps=4)
    exploding.model.optim.lr = 1e30
    exploding.model.optim.sched.warmup_steps = 0
    with pytest.raises(NonFiniteLossError, match="is nan at the validation after step 2"):
        distill(exploding)
    assert not (tmp_path / "kd").exists()


def test_different_vocabularies_are_refused(tiny, tmp_path):
    from nemo_minitron.config import FinetuneConfig
    from nemo_minitron.training.finetune import finetune

    architecture = {
        "num_layers": 1,
        "hidden_size": 64,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 640,
    }
    fields = tiny.training(tmp_path / "other", 1, init="random", architecture=architecture)
    finetune(FinetuneConfig(**fields))
    with pytest.raises(ConfigError, match="512 and 640"):
        distill(config(tiny, tmp_path / "other", tmp_path / "kd"))


@pytest.mark.usefixtures("forked_ranks")
def test_two_pipeline_stages_equal_one(tiny, student, tmp_path):
    """Real gloo ranks; the student's three layers are uneven over two stages. Data and tensor: in test_hidden."""
    one = distill(config(tiny, student, tmp_path / "one", steps=2))
    spread = config(tiny, student, tmp_path / "two", steps=2, pipeline_model_parallel_size=2)
    spread.trainer.devices = 2
    two = distill(spread)
    for expected, got in zip(
        one.metrics["train"] + one.metrics["validation"], two.metrics["train"] + two.metrics["validation"]
    ):
        assert got == pytest.approx(expected, abs=2e-4)
    weights, other = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert weights.keys() == other.keys()
    for name, tensor in weights.items():
        assert torch.allclose(other[name], tensor, atol=5e-4), name
    assert open_checkpoint(tmp_path / "two").architecture == open_checkpoint(tmp_path / "one").architecture


def same_weights(one, two) -> bool:
    first, second = read_weights(one), read_weights(two)
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def test_a_stage_that_has_ended_holds_no_model(tiny, tmp_path):
    """NeMo keeps classes of modules, and errors of imports with the frames above them, as long as a process lives."""
    import gc

    def models():
        gc.collect()
        return {id(one) for one in gc.get_objects() if type(one).__name__ in ("GPTModel", "Adam", "AdamW")}

    before = models()
    fields = tiny.training(tmp_path / "out", 1, restore_from_path=str(tiny.teacher))
    fields["model"].kd_teacher_restore_from_path = str(tiny.teacher)
    distill(DistillConfig(**fields))
    assert models() <= before
