"""A teacher's answers, kept and read back: against the teacher that runs, and against float64 arithmetic."""

import dataclasses
import errno
import json
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch

from hf import llama, read_weights
from nemo_minitron import config as c
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.storage import safetensors
from nemo_minitron.data.sample_sets import Passes, Piece, Windows
from nemo_minitron.distillation.command import distill
from nemo_minitron.distillation.losses.targets import drawn, largest
from nemo_minitron.distillation.teach.command import teach
from nemo_minitron.distillation.teach.folder import Kept, Together
from nemo_minitron.distillation.teach.forms import form_of
from nemo_minitron.distillation.teach.header import Header
from nemo_minitron.distillation.teach.listing import list_pieces
from nemo_minitron.errors import ConfigError, DataError, MinitronError
from nemo_minitron.planning.answers import LOSS_BYTES, token_bytes
from nemo_minitron.pruning.command import prune

STEPS, LENGTH = 3, 64
HEADER = {
    "hidden_size": 6, "vocab_size": 70_000, "draws": 300, "top_k": 5, "seq_length": 8, "text": True, "teacher": "",
    "tokenizer": "", "data": {}, "samples": [], "tokens": [], "precision": "bf16",
}  # fmt: skip


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("students") / "student"
    prune(tiny.pruning(path, hidden_size=96, ffn_hidden_size=192, drop_layers=[3]))
    return path


def teaching(tiny, output, teacher=None, keep="hidden", tokens=None, precision="bf16", **settings) -> c.TeachConfig:
    fields = tiny.training(output, restore_from_path=str(teacher or tiny.teacher))
    answers = c.AnswersConfig(keep=keep, tokens=tokens, precision=precision, **{"shard_megabytes": 4, **settings})
    return c.validated(c.TeachConfig(**fields, teach=answers))


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """Folders of answers by what is kept, with their manifests; those in fp32 are to the whole split."""
    root, made = tmp_path_factory.mktemp("kept"), {}

    def make(name):
        if name not in made:
            keep, _, precision = name.partition("-")
            tokens = None if precision == "fp32" else STEPS * 8 * LENGTH
            settings = teaching(tiny, root / name, keep=keep, tokens=tokens, precision=precision or "bf16")
            made[name] = root / name, teach(settings)
        return made[name]

    return make


def distilling(tiny, student, output, live=False, steps=STEPS, kd=None) -> c.DistillConfig:
    """A run on fixed windows; with `live` the teacher is named that runs."""
    model = {"kd_teacher_restore_from_path": str(tiny.teacher)} if live else {}
    fields = tiny.training(output, steps, restore_from_path=str(student), **model)
    fields["model"].data.windows = "fixed" if live else "auto"
    return c.validated(c.DistillConfig(**fields, kd=c.KDConfig(**(kd or {}))))


@pytest.fixture(scope="module")
def live(tiny, student, tmp_path_factory):
    """What the teacher that runs gives."""
    path = tmp_path_factory.mktemp("live") / "live"
    return path, distill(distilling(tiny, student, path, live=True))


def same_weights(one, two) -> bool:
    first, second = read_weights(one), read_weights(two)
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def losses(manifest):
    return [entry["kd_loss"] for split in ("train", "validation") for entry in manifest.metrics[split]]


def first_batch(config) -> torch.Tensor:
    windows = Windows([f"{config.model.data.data_prefix}/train"], LENGTH)
    order = Passes(len(windows), config.seed)
    return torch.stack([torch.as_tensor(windows[order[number]][0].ids) for number in range(8)])


def log_probabilities(path, ids) -> torch.Tensor:
    """Of transformers' model in float64 [b, s, v]."""
    with torch.no_grad():
        return llama(path, open_checkpoint(path).architecture).double()(ids[:, :-1]).logits.log_softmax(-1)


def test_hidden_states_in_fp32_give_the_live_teachers_run_bit_for_bit(tiny, student, kept, live, tmp_path):
    folder, manifest = kept("hidden-fp32")
    path, expected = live
    got = distill(distilling(tiny, student, tmp_path / "kept", kd={"teacher": str(folder)}))
    assert got.metrics["train"] == expected.metrics["train"]
    assert got.metrics["validation"] == expected.metrics["validation"]
    assert same_weights(path, tmp_path / "kept")
    windows = Windows([f"{tiny.data}/train"], LENGTH)
    assert manifest.metrics["relative_error"] == 0.0 and manifest.metrics["samples"] == len(windows) + 16
    assert "teacher" not in got.inputs and got.inputs["answers0"]["path"] == str(folder)


@pytest.mark.parametrize(("name", "error", "bound"), [("hidden-bf16", 2**-9, 2e-4), ("hidden-fp8", 2**-4, 1e-2)])
def test_rounded_hidden_states_give_it_within_their_rounding(tiny, student, kept, live, tmp_path, name, error, bound):
    folder, manifest = kept(name)
    got = distill(distilling(tiny, student, tmp_path / "kept", kd={"teacher": str(folder)}))
    assert losses(got) == pytest.approx(losses(live[1]), abs=bound) and losses(got) != losses(live[1])
    assert 0 < manifest.metrics["relative_error"] < error
    assert manifest.metrics["bytes_per_token"] == pytest.approx({"bf16": 256, "fp8": 132}[name[7:]] + 2, rel=0.05)


def test_any_order_and_batch_reads_the_right_rows(tiny, student, kept, tmp_path):
    """Another seed, micro batch and form than the answers were written with."""
    runs = []
    for name in ("live", "kept"):
        kd = {"form": "chunked", "temperature": 2.0, "lm_weight": 0.5, "loss": "reverse_kl"}
        kd |= {"teacher": str(kept("hidden-fp32")[0])} if name == "kept" else {}
        settings = distilling(tiny, student, tmp_path / name, name == "live", kd=kd)
        settings.seed, settings.model.micro_batch_size = 7, 2
        runs.append(distill(settings))
    for split in ("train", "validation"):
        for one, other in zip(runs[0].metrics[split], runs[1].metrics[split], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("other", ["kept", "live"])
def test_two_teachers_are_their_mixture(tiny, student, kept, tmp_path, other):
    """One kept, the other kept or running; the student itself serves as a second teacher."""
    teach(teaching(tiny, tmp_path / "second", student, tokens=8 * LENGTH, precision="fp32"))
    first = str(kept("hidden-fp32")[0]) if other == "kept" else "live"
    kd = {"teachers": {first: 3.0, str(tmp_path / "second"): 1.0}}
    settings = distilling(tiny, student, tmp_path / "kd", other == "live", steps=1, kd=kd)
    got = distill(settings).metrics["train"][0]["kd_loss"]
    ids = first_batch(settings)
    teacher, own = log_probabilities(tiny.teacher, ids), log_probabilities(student, ids)
    mixture = 0.75 * teacher.exp() + 0.25 * own.exp()
    assert got == pytest.approx(float((mixture * (mixture.log() - own)).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("keep", ["sampled", "topk"])
@pytest.mark.parametrize("form", ["fused", "chunked"])
def test_entries_of_distributions_equal_float64_arithmetic(tiny, student, kept, tmp_path, keep, form):
    folder, manifest = kept(keep)
    settings = distilling(tiny, student, tmp_path / "kd", steps=1, kd={"teacher": str(folder), "form": form})
    got = distill(settings).metrics["train"][0]["kd_loss"]
    ids, answers = first_batch(settings), Together([Kept(folder)])
    own, exact = log_probabilities(student, ids), log_probabilities(tiny.teacher, ids)
    values = []
    for row, q, p in zip(ids, own, exact):
        fields = answers.sample((Piece(row.numpy(), numpy.ones(len(row), dtype=bool)),), LENGTH)
        probabilities, entries = fields["probabilities"].double(), fields["entries"].long()
        assert fields["entropy"].double() == pytest.approx(-(p.exp() * p).sum(-1), abs=2e-3)
        cross = -(probabilities * q.gather(-1, entries)).sum(-1)
        if keep == "sampled":
            values.append(cross - fields["entropy"].double())
            assert torch.allclose(probabilities.sum(-1), torch.ones(LENGTH, dtype=torch.float64))
        else:
            rest, others = fields["rest"].double(), 1 - q.exp().gather(-1, entries).sum(-1)
            values.append(
                cross - rest * others.log() + (probabilities * probabilities.log()).sum(-1) + rest * rest.log()
            )
            assert torch.allclose(probabilities, p.exp().topk(64).values, rtol=6e-3)
    assert got == pytest.approx(float(torch.cat(values).mean()), abs=2e-5)
    exactly = (exact.exp() * (exact - own)).sum(-1).mean()
    assert got == pytest.approx(float(exactly), abs=0.05) and manifest.metrics["bytes_per_token"] < 300


@pytest.mark.parametrize("blend", [False, True])
def test_rows_of_instructions_have_answers_too(tiny, student, tmp_path, blend):
    """Rows of several lengths, with padding behind them, alone and beside text; validation fills no batch. Packed they
    have the answers that were given to each alone."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input": f"Say {n}", "output": f"{n} " * (n % 7 + 1)}) for n in range(40)))

    def on_rows(config):
        named = {"blend": {str(tiny.data): 0.25, str(rows): 0.75}} if blend else {"instructions": str(rows)}
        config.model.data = c.ModelDataConfig(**named, seq_length=LENGTH, num_workers=0)
        return c.validated(config)

    runs = {"live": distill(on_rows(distilling(tiny, student, tmp_path / "live", live=True)))}
    for keep in ("hidden", "sampled"):
        tokens = STEPS * 8 * LENGTH if blend else None
        teach(on_rows(teaching(tiny, tmp_path / keep, keep=keep, tokens=tokens, precision="fp32", draws=200)))
        kd = {"teacher": str(tmp_path / keep)}
        runs[keep] = distill(on_rows(distilling(tiny, student, tmp_path / f"{keep}-student", kd=kd)))
    assert losses(runs["hidden"]) == pytest.approx(losses(runs["live"]), abs=1e-5)
    assert losses(runs["sampled"]) == pytest.approx(losses(runs["live"]), abs=0.05)
    if blend:
        return

    def packed(config):
        config.model.micro_batch_size, config.model.data.packing = 1, True
        return c.validated(config)

    runs = {
        "live": distill(packed(on_rows(distilling(tiny, student, tmp_path / "live-packed", live=True)))),
        "hidden": distill(
            packed(on_rows(distilling(tiny, student, tmp_path / "packed", kd={"teacher": str(tmp_path / "hidden")})))
        ),
    }
    assert runs["hidden"].metrics["padding"] < runs["hidden"].metrics["padding_unpacked"]
    assert losses(runs["hidden"]) == pytest.approx(losses(runs["live"]), abs=1e-5)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("share", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_two_ranks_that_share_a_model_write_and_read_what_one_does(tiny, student, kept, tmp_path, share):
    """Of the vocabulary's rows each tensor rank reads its own; the last pipeline stage writes and reads."""

    def on_two(config):
        setattr(config.model, share, 2)
        config.trainer.devices = 2
        return c.validated(config)

    tokens = STEPS * 8 * LENGTH
    teach(on_two(teaching(tiny, tmp_path / "answers", precision="fp32", tokens=tokens)))
    teach(teaching(tiny, tmp_path / "alone", precision="fp32", tokens=tokens))
    two, one = Kept(tmp_path / "answers"), Kept(tmp_path / "alone")
    assert two.header == one.header
    torch.testing.assert_close(two.output_matrix(0, 512), one.output_matrix(0, 512), rtol=0, atol=0)
    piece = Windows([f"{tiny.data}/train"], LENGTH)[Passes(len(Windows([f"{tiny.data}/train"], LENGTH)), 1234)[0]][0]
    torch.testing.assert_close(two.fields(piece)["hidden"], one.fields(piece)["hidden"], rtol=1e-5, atol=1e-5)
    kd = {"teacher": str(tmp_path / "answers")}
    runs = [
        distill(distilling(tiny, student, tmp_path / "run-alone", kd=kd)),
        distill(on_two(distilling(tiny, student, tmp_path / "run-on-two", kd=kd))),
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=5e-5)


def test_entries_come_back_as_they_were_written():
    """Vocabularies and draws that need more than a byte, tokens with one entry and with many."""
    logits = torch.randn(7, 70_000, dtype=torch.float64) * 3
    logits[2, 69_999] = 50.0
    for keep, answer in (
        ("sampled", drawn(logits, 300, torch.Generator().manual_seed(1))),
        ("topk", largest(logits, 5)),
    ):
        form = form_of(Header(**HEADER | {"keep": keep}))
        written = form.encode(answer)
        fields = form.decode(written)
        size = sum(tensor.numel() * tensor.itemsize for tensor in written.values()) / 7
        assert size <= form.token_bytes and (keep == "topk") == (size == form.token_bytes)
        width = answer.entries.shape[1]
        asked = c.AnswersConfig(keep=keep, draws=300, top_k=5)
        assert token_bytes(SimpleNamespace(hidden_size=6, vocab_size=70_000), asked) == form.token_bytes + LOSS_BYTES
        used = answer.probabilities > 0
        assert torch.equal(fields["entries"][:, :width].long()[used], answer.entries[used])
        torch.testing.assert_close(fields["probabilities"][:, :width], answer.probabilities, rtol=4e-3, atol=1e-7)
        assert not fields["probabilities"][:, width:].any()
        if answer.rest is not None:
            torch.testing.assert_close(fields["rest"], answer.rest, rtol=4e-3, atol=1e-7)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    """A full disk at the third shard: two stay, the message says so, and the same command ends it."""
    from nemo_minitron.distillation.teach import writer

    settings = {"keep": "sampled", "tokens": 600 * LENGTH, "shard_megabytes": 1, "draws": 100}
    teach(teaching(tiny, tmp_path / "whole", **settings))
    write, written = safetensors.write, []

    def full(file, tensors):
        written.append(file.name)
        if len(written) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(writer.safetensors, "write", full)
        with pytest.raises(MinitronError, match="the 2 whole shards in it stay, and the same command goes on"):
            teach(teaching(tiny, tmp_path / "stopped", **settings))
    left = tmp_path / ".stopped.partial" / "shards"
    assert sorted(path.name for path in left.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    before = (left / "00001.safetensors").stat().st_mtime_ns
    manifest = teach(teaching(tiny, tmp_path / "stopped", **settings))
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(files) > 3 and [path for path in files if (tmp_path / "stopped" / path).is_file()] == files
    for path in [*files, "answers.json"]:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "stopped" / path).read_bytes(), path
    assert (tmp_path / "stopped" / "shards" / "00001.safetensors").stat().st_mtime_ns == before
    assert manifest.metrics["train_loss"] == pytest.approx(float(manifest.metrics["validation_loss"]), rel=0.2)


@pytest.mark.usefixtures("forked_ranks")
def test_what_is_missing_is_named_or_filled(tiny, student, live, tmp_path, capfd):
    """Filled and read on two data-parallel ranks."""
    teach(teaching(tiny, tmp_path / "few", tokens=10 * LENGTH, precision="fp32"))
    kd = {"teacher": str(tmp_path / "few")}
    windows = Windows([f"{tiny.data}/train"], LENGTH)
    place = windows.place(Passes(len(windows), 1234)[10])
    with pytest.raises(DataError, match=f"lacks the answers to 14 of the 40 samples.* first is {place}.*kd.fill=true"):
        distill(distilling(tiny, student, tmp_path / "kd", kd=kd))
    filled = distilling(tiny, student, tmp_path / "kd", live=True, kd=kd | {"fill": True})
    filled.trainer.devices, filled.model.micro_batch_size = 2, 2
    assert losses(distill(filled)) == pytest.approx(losses(live[1]), abs=2e-4)
    assert f"the teacher answers what {tmp_path / 'few'} lacks: sample 14 of 14" in capfd.readouterr().err
    assert not (tmp_path / "kd" / "filled").exists()


def test_folders_that_do_not_fit_are_refused(tiny, student, kept, tmp_path):
    source = kept("hidden-bf16")[0]

    def refusal(change):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        if callable(change):
            change(folder)
        else:
            header = json.loads((folder / "answers.json").read_text())
            (folder / "answers.json").write_text(json.dumps(header | change))
        with pytest.raises(DataError) as caught:
            distill(distilling(tiny, student, tmp_path / "kd", kd={"teacher": str(folder)}))
        return str(caught.value)

    assert "another tokenizer" in refusal({"tokenizer": "other"})
    assert "windows of 32 tokens, and this run reads 64" in refusal({"seq_length": 32})
    assert "is not whole" in refusal({"vocab_size": 640})
    assert "samples of 1 shards and tokens of 2" in refusal({"tokens": [1, 2]})
    assert "is not whole" in refusal({"tokens": [7]})
    assert "hidden_size = 'wide'" in refusal({"hidden_size": "wide"})
    assert "version 2 and not 1" in refusal({"version": 2})
    assert "is damaged" in refusal(lambda folder: (folder / "answers.json").write_text("{"))
    assert "holds no answers.json" in refusal(lambda folder: (folder / "answers.json").unlink())
    assert "is not whole" in refusal(lambda folder: (folder / "shards" / "00000.safetensors").unlink())
    assert "is not whole" in refusal(lambda folder: (folder / "output.safetensors").unlink())

    def shorten(folder):
        path = folder / "shards" / "00000.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    assert "truncated" in refusal(shorten)
    other = teaching(tiny, tmp_path / "other", student, tokens=10 * LENGTH)
    teach(other)
    with pytest.raises(ConfigError, match="the answers are not those of"):
        distill(distilling(tiny, student, tmp_path / "kd", live=True, kd={"teacher": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match="temperature 1 alone, not kd.loss=reverse_kl"):
        distill(distilling(tiny, student, tmp_path / "kd", kd={"teacher": str(kept("topk")[0]), "loss": "reverse_kl"}))


def test_a_sample_is_answered_once(tiny):
    """Equal rows, and pieces of a packed sample, each once; a limit counts tokens of training alone."""

    class Packed(list):
        length = 8

        def place(self, number):
            return str(number)

    def piece(*ids):
        return Piece(list(ids), [True] * len(ids))

    samples = Packed([(piece(1, 2, 3), piece(4, 5)), (piece(4, 9),), (piece(1, 2, 3, 4),), (piece(6, 7),)])
    sets = {"train": samples, "validation": Packed([(piece(6, 8),), (piece(7, 7),)])}
    listing = list_pieces(sets, {"train": range(4), "validation": range(2)})
    assert [tuple(place) for place in listing.places] == [
        ("train", 0, 0), ("train", 0, 1), ("train", 2, 0), ("train", 3, 0), ("validation", 1, 0)
    ]  # fmt: skip
    assert listing.tokens.tolist() == [2, 1, 3, 1, 1] and listing.shown(4) == "1"
    few = list_pieces(sets, {"train": range(4), "validation": range(2)}, tokens=4)
    assert few.tokens.tolist() == [2, 1, 1, 1]
    assert listing.shards(3, 1.0, 1) == [range(2), range(2, 3), range(3, 5)]
    assert listing.shards(3, 1.0, 2) == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("kd", "problem"),
    [
        ({"teacher": "a", "teachers": {"b": 1.0}}, "give one"),
        ({"teachers": {"a": 0.0}}, "each share a number above 0"),
        ({"teachers": ["a"]}, "each share a number above 0"),
        ({"teacher": "a", "hidden": c.HiddenLossConfig(weight=1.0)}, "needs a teacher that runs"),
        ({"teacher": "a", "top_k": 4}, "teach.keep=topk"),
        ({"teachers": {"a": 1.0, "live": 1.0}}, "kd_teacher_restore_from_path is missing"),
        ({"fill": True}, "needs the folder"),
        ({"teacher": "a", "fill": True}, "kd_teacher_restore_from_path is missing"),
    ],
)
def test_settings_that_contradict_each_other(tiny, kd, problem):
    with pytest.raises(ConfigError, match=problem):
        distilling(tiny, "student", "out", kd=kd)


def test_windows_that_are_shuffled_have_no_answers(tiny):
    shuffled = tiny.training("out", restore_from_path="teacher")
    shuffled["model"].data.windows = "shuffled"
    for kind, more in ((c.TeachConfig, {}), (c.DistillConfig, {"kd": c.KDConfig(teacher="a")})):
        with pytest.raises(ConfigError, match="model.data.windows = shuffled"):
            c.validated(kind(**shuffled, **more))


def test_folders_with_shares_are_named_on_the_command_line():
    from nemo_minitron.config.command_line import repeat
    from nemo_minitron.config.compose import compose

    given = ["model.restore_from_path=/s", "model.data.data_prefix=/d", "kd.teachers={/runs/a.v2:0.5,b-c:1}"]
    config = compose("distill", given)
    assert config.kd.shares == {"/runs/a.v2": 0.5, "b-c": 1}
    again = repeat("distill", dataclasses.asdict(config))
    assert again is not None and "kd.teachers={/runs/a.v2:0.5,b-c:1}" in again
