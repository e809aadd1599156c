"""The connectors, through NeMo's own llm.import_ckpt."""

import json

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.formats.nemo2.classes import CLASSES
from nemo_minitron.checkpoints.formats.nemo2.engine import nemo_model
from nemo_minitron.errors import ConfigError


@pytest.fixture(scope="module")
def model(tiny):
    import nemo_minitron.integrations.connectors  # noqa: F401

    return nemo_model(open_checkpoint(tiny.teacher).architecture)


def sizes(path) -> tuple[int, int, int]:
    architecture = open_checkpoint(path).architecture
    return architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size


def test_depth_then_distil(tiny, model, tmp_path):
    from nemo.collections import llm

    student = llm.import_ckpt(
        model, source=f"minitron-depth://{tiny.teacher}", output_path=tmp_path / "student", drop_layers=["2-3"]
    )
    assert sizes(student) == (2, 128, 256)
    distilled = llm.import_ckpt(
        model,
        source=f"minitron-distill://{student}",
        output_path=tmp_path / "distilled",
        teacher=tiny.teacher,
        data=tiny.data,
        max_steps=2,
        val_check_interval=1,
        limit_val_batches=1,
        micro_batch_size=4,
        global_batch_size=4,
        num_workers=0,
        seq_length=64,
        lr=1e-3,
    )
    assert sizes(distilled) == (2, 128, 256)


def test_width(tiny, model, tmp_path):
    from nemo.collections import llm

    output = llm.import_ckpt(
        model,
        source=f"minitron-width://{tiny.teacher}",
        output_path=tmp_path / "student",
        data=str(tiny.data),
        seq_length=64,
        hidden_size=96,
        ffn_hidden_size=128,
        hidden_size_divisor=32,
        ffn_hidden_size_divisor=64,
        num_samples=8,
        scores_path=tmp_path / "scores",
    )
    assert sizes(output) == (4, 96, 128)


def test_search(tiny, model, tmp_path):
    """What is imported is the winner's checkpoint; the search's table lies beside it."""
    from nemo.collections import llm

    output = llm.import_ckpt(
        model,
        source=f"minitron-search://{tiny.teacher}",
        output_path=tmp_path / "found",
        data=str(tiny.data),
        parameters="60%",
        num_layers=4,
        measured=2,
        candidates=2,
        steps=1,
        samples=4,
        hidden_size_divisor=32,
        ffn_hidden_size_divisor=64,
        num_samples=8,
        limit_val_batches=1,
        micro_batch_size=4,
        global_batch_size=4,
        num_workers=0,
        seq_length=64,
        lr=1e-3,
    )
    assert output == tmp_path / "found" / "student" and sizes(output)[0] == 4
    winner = json.loads((tmp_path / "found" / "search.json").read_text())["winner"]
    assert open_checkpoint(output).architecture.to_dict() == winner["architecture"]
    with pytest.raises(ConfigError, match="give a budget"):
        llm.import_ckpt(model, source=f"minitron-search://{tiny.teacher}", output_path=tmp_path / "none", data="data")


def test_every_dense_family_has_them(model):
    from nemo.collections import llm

    from nemo_minitron.integrations.connectors import CONNECTORS

    for class_name, _ in CLASSES.values():
        family = getattr(llm, class_name)
        for name in CONNECTORS:
            assert type(family.importer(f"{name}:///somewhere")).__name__.startswith("Minitron")
        assert class_name == "GPTModel" or family.importer("hf:///somewhere")  # NeMo's own is still there


def test_unknown_keywords_are_named(tiny, model, tmp_path):
    from nemo.collections import llm

    with pytest.raises(ConfigError, match="hiden_size"):
        llm.import_ckpt(
            model,
            source=f"minitron-depth://{tiny.teacher}",
            output_path=tmp_path / "student",
            drop_layers=[1],
            hiden_size=3,
        )


def test_nemo1_and_hf_come_in_and_go_out(tiny, model, tmp_path):
    """Through NeMo's own import_ckpt and export_ckpt, without Transformer Engine, a pruned shape."""
    from nemo.collections import llm

    from nemo_minitron.pruning.command import prune

    prune(tiny.pruning(tmp_path / "student", hidden_size=96, drop_layers=[2]))
    start = open_checkpoint(tmp_path / "student")
    archive = llm.export_ckpt(tmp_path / "student", "nemo1", output_path=tmp_path / "student.nemo")
    directory = llm.export_ckpt(tmp_path / "student", "hf", output_path=tmp_path / "student-hf", verify="none")
    for number, source in enumerate((f"nemo1://{archive}", f"hf://{directory}")):
        back = llm.import_ckpt(model, source, output_path=tmp_path / f"back{number}", verify="tensors")
        found = open_checkpoint(back)
        assert found.architecture == start.architecture
        for name, tensor in start.tensors.items():
            assert tensor.read().equal(found.tensors[name].read()), name


def test_an_export_never_replaces_what_is_there(tiny, model, tmp_path):
    from nemo.collections import llm

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("mine")
    with pytest.raises(FileExistsError):
        llm.import_ckpt(model, f"nemo1://{tiny.teacher}", output_path=tmp_path / "there")
    assert (tmp_path / "there" / "precious").read_text() == "mine"


def test_nemos_own_hf_connectors_stay_beneath(tiny, model, tmp_path, monkeypatch):
    """With Transformer Engine and plain shapes they do the work; ours are subclasses of them."""
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.llama import HFLlamaExporter, HFLlamaImporter

    from nemo_minitron.integrations.connectors import nemo_can
    from nemo_minitron.pruning.command import prune

    assert isinstance(llm.LlamaModel.importer("hf://meta-llama/Llama-3.1-8B"), HFLlamaImporter)
    assert isinstance(llm.LlamaModel.exporter("hf", "/somewhere"), HFLlamaExporter)
    assert not nemo_can(tmp_path / "nowhere")  # without Transformer Engine
    prune(tiny.pruning(tmp_path / "pruned", hidden_size=96))
    with monkeypatch.context() as patch:
        patch.setattr("nemo_minitron.packages.versions.has_module", lambda name: True)
        assert nemo_can(tiny.teacher)
        assert llm.LlamaModel.exporter("hf", tiny.teacher).nemo_in_charge
        assert not llm.LlamaModel.exporter("hf", tmp_path / "pruned").nemo_in_charge
        assert not llm.LlamaModel.exporter("nemo1", tiny.teacher).nemo_in_charge
