"""The connectors, through NeMo's own llm.import_ckpt."""

import pytest

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.nemo2 import CLASSES, nemo_model
from nemo_minitron.errors import ConfigError


@pytest.fixture(scope="module")
def model(tiny):
    import nemo_minitron.connectors  # noqa: F401

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


def test_every_dense_family_has_them(model):
    from nemo.collections import llm

    from nemo_minitron.connectors import CONNECTORS

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
