"""Training on a blend: what is read, losses by source, dynamic shares, resuming, ranks and workers."""

import json
import math

import pytest
import torch
from conftest import SEQ_LENGTH

from hf import llama, read_weights
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.command import prepare
from nemo_minitron.distillation.command import distill
from nemo_minitron.distillation.teach.command import teach
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation.loss import evaluate_loss
from nemo_minitron.pruning.command import prune
from nemo_minitron.training import loop
from nemo_minitron.training.finetune import finetune

SHARES = {"wiki": 0.5, "news": 0.3, "chat": 0.2}
LIMIT = 4


@pytest.fixture(scope="module")
def sources(tiny, tmp_path_factory):
    """wiki, the teacher's own text; news, another; chat, rows."""
    root = tmp_path_factory.mktemp("sources")
    (root / "wiki").symlink_to(tiny.data)
    tokenizer = str(tiny.data / "tokenizer")
    prepare(c.DataConfig(output=str(root / "news"), domain="broad", words=20_000, tokenizer=tokenizer))
    (root / "chat").mkdir()
    for split, numbers in (("train", range(40)), ("validation", range(40, 50))):
        rows = [{"input": f"Where is {n}?", "output": f"{n} lies on river {n % 3} " * (1 + n % 3)} for n in numbers]
        (root / "chat" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def settings(tiny, sources, output, steps=4, blend=None, **model) -> dict:
    fields = tiny.training(output, steps, restore_from_path=str(tiny.teacher), **model)
    fields["model"].data = c.ModelDataConfig(
        data_prefix=str(sources), blend=dict(blend or SHARES), seq_length=SEQ_LENGTH, num_workers=0
    )
    fields["trainer"].limit_val_batches = LIMIT
    return fields


def dynamic(tiny, sources, output, **reference) -> c.FinetuneConfig:
    config = c.FinetuneConfig(**settings(tiny, sources, output, steps=6, blend={"wiki": 1, "news": 1}))
    config.trainer.val_check_interval = 1
    config.model.data.dynamic = True
    config.model.data.reference = reference or {"wiki": 2.0, "news": 1.0}
    return c.validated(config)


def float64_losses(checkpoint, config, split="validation") -> dict[str, float]:
    """lm_loss of a checkpoint on each source's samples, each source opened and read alone, in float64."""
    from nemo_minitron.data.sample_module import filled
    from nemo_minitron.training.inputs import training_inputs

    model = llama(checkpoint, open_checkpoint(checkpoint).architecture).double()
    architecture, tokenizer = open_checkpoint(checkpoint).architecture, open_checkpoint(checkpoint).tokenizer
    losses = {}
    for name in config.model.data.blend:
        alone = c.FinetuneConfig(trainer=config.trainer, model=c.ModelConfig(
            global_batch_size=8, micro_batch_size=4, data=c.ModelDataConfig(
                seq_length=SEQ_LENGTH, windows="fixed", **(
                    {"instructions": f"{config.model.data.data_prefix}/{name}"} if name == "chat" else
                    {"data_prefix": f"{config.model.data.data_prefix}/{name}"}))))  # fmt: skip
        samples = training_inputs(alone, architecture, tokenizer).sets()[split]
        share = -(-LIMIT * 8 // len(config.model.data.blend))
        items = [filled(samples[n], samples.length, 0) for n in range(min(share, len(samples)))]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        with torch.no_grad():
            logits = model(batch["tokens"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        mask = batch["loss_mask"].flatten().double()
        losses[name] = (float((loss * mask).sum()), float(mask.sum()), len(items))
    return losses


@pytest.fixture(scope="module")
def trained(tiny, sources, tmp_path_factory):
    config = c.validated(c.FinetuneConfig(**settings(tiny, sources, tmp_path_factory.mktemp("blend") / "run")))
    config.monitor = "last"
    return config, finetune(config)


def test_losses_by_source_are_those_of_each_source_alone(trained):
    config, manifest = trained
    alone = float64_losses(config.output, config)
    last = manifest.metrics["validation"][-1]
    counts = [math.ceil((LIMIT * 8 - place) / 3) for place in range(2)] + [10]
    assert [alone[name][2] for name in SHARES] == [11, 11, 10] == counts
    for name, (total, tokens, _) in alone.items():
        assert last[f"lm_loss/{name}"] == pytest.approx(total / tokens, abs=2e-5)
    weights = {name: SHARES[name] / count for name, (_, _, count) in alone.items()}
    together = sum(weights[name] * total for name, (total, _, _) in alone.items())
    assert last["lm_loss"] == pytest.approx(
        together / sum(weights[name] * tokens for name, (_, tokens, _) in alone.items()), abs=2e-5
    )


def test_the_manifest_and_tensorboard_tell_of_each_source(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, manifest = trained
    told = manifest.metrics["blend"]
    assert {name: entry["samples"] for name, entry in told.items()} == {"wiki": 16, "news": 10, "chat": 6}
    assert told["chat"]["train"]["rows"] == 40 and told["news"]["share"] == pytest.approx(0.3)
    assert {"wiki-train0", "news-validation0", "chat-instructions-train0"} < set(manifest.inputs)
    first = manifest.metrics["train"][0]
    assert min(first[f"lm_loss/{name}"] for name in SHARES) < first["lm_loss"] < max(
        first[f"lm_loss/{name}"] for name in SHARES
    )  # fmt: skip
    events = EventAccumulator(f"{config.output}/tensorboard").Reload()
    scalars = {event.step: event.value for event in events.Scalars("validation/lm_loss/news")}
    assert scalars == pytest.approx({line["step"]: line["lm_loss/news"] for line in manifest.metrics["validation"]})
    assert events.Scalars("train/lm_loss/chat")


def test_rows_of_a_blend_are_packed_beside_text(tiny, sources, tmp_path):
    """A learning rate of nothing leaves the teacher: losses by source are those of its unpacked samples."""
    config = c.FinetuneConfig(**settings(tiny, sources, tmp_path / "run", steps=1))
    config.model.micro_batch_size, config.model.data.packing, config.monitor = 1, True, "last"
    config.model.optim.lr = config.model.optim.sched.min_lr = 1e-12
    metrics = finetune(c.validated(config)).metrics
    packed = metrics["packing"]["chat"]
    assert packed["sequences"] < 40 and packed["padding"] < packed["padding_unpacked"]
    assert metrics["blend"]["chat"]["validation_samples"] == packed["validation_sequences"] < 10
    total, tokens, rows = float64_losses(tiny.teacher, config)["chat"]
    assert rows == 10 and metrics["validation"][-1]["lm_loss/chat"] == pytest.approx(total / tokens, abs=2e-5)
    config.model.micro_batch_size = 4
    with pytest.raises(ConfigError, match="packing needs model.micro_batch_size=1"):
        c.validated(config)


def test_any_workers_and_micro_batch_read_the_same(tiny, sources, trained, tmp_path):
    config = c.FinetuneConfig(**settings(tiny, sources, tmp_path / "run"))
    config.monitor, config.model.micro_batch_size, config.model.data.num_workers = "last", 2, 2
    metrics = finetune(c.validated(config)).metrics
    for split in ("train", "validation"):
        for one, other in zip(metrics[split], trained[1].metrics[split], strict=True):
            assert one == pytest.approx(other, abs=3e-5)
    assert metrics["blend"] == trained[1].metrics["blend"]


def test_dynamic_shares_follow_the_losses_for_any_workers_and_resume_in_the_same_bits(
    tiny, sources, tmp_path, monkeypatch
):
    whole = finetune(dynamic(tiny, sources, tmp_path / "whole")).metrics
    shares, given = {"wiki": 0.5, "news": 0.5}, []
    for line in whole["validation"]:
        given.append(shares)
        weights = {
            name: shares[name] * math.exp(max(line[f"lm_loss/{name}"] - {"wiki": 2.0, "news": 1.0}[name], 0))
            for name in shares
        }
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        assert {name: line[f"share/{name}"] for name in shares} == pytest.approx(shares, abs=1e-12)
    # Shares of a validation count one interval, here a step, later.
    due = 8 * sum(given[max(step - 1, 0)]["news"] for step in range(6))
    assert abs(whole["blend"]["news"]["samples"] - due) < 1.5 and whole["blend"]["news"]["samples"] > 28
    config = dynamic(tiny, sources, tmp_path / "workers")
    config.model.data.num_workers = 3
    assert finetune(config).metrics == whole

    original = loop.history_callback

    def stopping(config, partial):
        history = original(config, partial)
        begin = history.on_train_batch_start

        def stop(trainer, *arguments):
            if trainer.global_step == 3:
                raise KeyboardInterrupt
            begin(trainer, *arguments)

        history.on_train_batch_start = stop
        return history

    config = dynamic(tiny, sources, tmp_path / "resumed")
    config.model.data.num_workers = 1
    with monkeypatch.context() as patch:
        patch.setattr(loop, "history_callback", stopping)
        with pytest.raises(BaseException):  # noqa: B017
            finetune(config)
    assert not (tmp_path / "resumed").exists() and (tmp_path / ".resumed.partial" / "checkpoints" / "step-3").is_dir()
    assert finetune(config).metrics == whole
    one, other = read_weights(tmp_path / "whole"), read_weights(tmp_path / "resumed")
    assert all(torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.usefixtures("forked_ranks")
def test_distilling_measures_the_teacher_once_and_two_ranks_agree(tiny, sources, tmp_path):
    """A teacher whose answers are kept has kept its losses, too."""

    def run(name: str, devices: int = 1, **kd) -> Manifest:
        named = {} if kd else {"kd_teacher_restore_from_path": str(tiny.teacher)}
        fields = settings(tiny, sources, tmp_path / name, steps=3, **named)
        fields["trainer"].val_check_interval, fields["trainer"].devices = 1, devices
        fields["model"].data.dynamic = True
        return distill(c.validated(c.DistillConfig(**fields, kd=c.KDConfig(**kd))))

    manifest, two = run("one"), run("two", 2)
    teach(c.validated(c.TeachConfig(**settings(tiny, sources, tmp_path / "answers", steps=3))))
    kept = run("kept", teacher=str(tmp_path / "answers"))
    for name, entry in kept.metrics["blend"].items():
        assert entry["reference"] == pytest.approx(manifest.metrics["blend"][name]["reference"], abs=1e-3)  # in fp16
    config = c.FinetuneConfig(**settings(tiny, sources, tmp_path / "one"))
    for name, (total, tokens, _) in float64_losses(tiny.teacher, config).items():
        assert manifest.metrics["blend"][name]["reference"] == pytest.approx(total / tokens, abs=2e-5)
        assert two.metrics["blend"][name]["reference"] == pytest.approx(total / tokens, abs=2e-5)
        assert f"kd_loss/{name}" in manifest.metrics["validation"][0]
    for split in ("train", "validation"):
        for one, other in zip(manifest.metrics[split], two.metrics[split], strict=True):
            assert one == pytest.approx(other, abs=3e-5)


def test_a_cut_is_scored_on_the_shares_of_a_blend(tiny, sources, tmp_path):
    config = tiny.pruning(tmp_path / "student", hidden_size=96, scores_path=str(tmp_path / "scores"))
    config.model.data = c.ModelDataConfig(data_prefix=str(sources), blend=dict(SHARES), seq_length=SEQ_LENGTH)
    prune(c.validated(config))
    scores = Manifest.read(tmp_path / "scores")
    drawn = scores.details["samples"]
    assert {name: drawn["sources"].count(name) for name in SHARES} == {"wiki": 8, "news": 5, "chat": 3}
    assert {"wiki-train0", "chat-instructions-train0"} < set(scores.inputs) and scores.metrics["samples"] == 16


def test_the_loss_of_a_blend_is_that_of_its_sources_as_they_are_shared(tiny, sources, tmp_path):
    def measured(name: str, **data) -> dict:
        fields = tiny.training(tmp_path / name, restore_from_path=str(tiny.teacher))
        fields["model"].data = c.ModelDataConfig(seq_length=SEQ_LENGTH, **data)
        return evaluate_loss(c.validated(c.LossConfig(**fields, splits=["test"], limit_batches=2))).metrics["test"]

    both = measured("both", data_prefix=str(sources), blend={"wiki": 1, "news": 3})
    alone = {name: measured(name, data_prefix=str(sources / name)) for name in ("wiki", "news")}
    assert both["by_source"] == alone and both["tokens"] == sum(one["tokens"] for one in alone.values())
    assert both["loss"] == pytest.approx(0.25 * alone["wiki"]["loss"] + 0.75 * alone["news"]["loss"])
    with pytest.raises(DataError, match="chat: .* measured on text alone"):
        measured("rows", data_prefix=str(sources), blend={"wiki": 1, "chat": 1})
