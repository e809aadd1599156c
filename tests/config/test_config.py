"""Each configuration names everything that is wrong with it."""

import pytest

from nemo_minitron import config as schemas
from nemo_minitron.config import all_problems, validated
from nemo_minitron.errors import ConfigError


def trained(**model):
    return schemas.ModelConfig(
        restore_from_path="/teacher",
        kd_teacher_restore_from_path="/teacher",
        data=schemas.ModelDataConfig(data_prefix="/data"),
        **model,
    )


def pruned(targets, **model):
    return schemas.PruneConfig(
        model=schemas.PruneModelConfig(restore_from_path="/teacher", **model),
        prune=schemas.PruneTargets(**targets),
        export=schemas.ExportConfig(save_path="/out"),
    )


def test_problems_carry_the_dotted_name_of_their_place():
    config = schemas.FinetuneConfig(trainer=schemas.TrainerConfig(max_steps=0), model=trained(micro_batch_size=0))
    messages = all_problems(config)
    assert "trainer.max_steps = 0 must be at least 1" in messages
    assert "model.micro_batch_size = 0 must be at least 1" in messages


def test_validated_raises_once_with_all_problems():
    with pytest.raises(ConfigError) as caught:
        validated(schemas.DataConfig(output="/o", words=0, workers=0), "minitron data")
    assert str(caught.value).splitlines() == [
        "minitron data: 2 problems",
        "  - workers = 0 must be at least 1",
        "  - words = 0 must be at least 1",
    ]


def test_one_problem_is_one_line():
    with pytest.raises(ConfigError, match="^configuration: words = 0 must be at least 1$"):
        validated(schemas.DataConfig(output="/o", words=0))


@pytest.mark.parametrize(
    "trainer, model, message",
    [
        ({"devices": 6}, {"tensor_model_parallel_size": 4}, "world size 6"),
        ({"devices": 8}, {"micro_batch_size": 3, "global_batch_size": 128}, "model.global_batch_size 128"),
        ({}, {"sequence_parallel": True}, "model.sequence_parallel"),
    ],
)
def test_layouts_that_do_not_fit_print_the_equation(trainer, model, message):
    messages = all_problems(schemas.FinetuneConfig(trainer=schemas.TrainerConfig(**trainer), model=trained(**model)))
    assert [problem for problem in messages if message in problem]


def test_stages_name_what_is_missing():
    text = " ".join(all_problems(schemas.DistillConfig(model=schemas.ModelConfig())))
    for name in ("model.restore_from_path", "model.kd_teacher_restore_from_path", "model.data.data_prefix"):
        assert f"{name} is missing" in text
    text = " ".join(all_problems(schemas.PruneConfig()))
    for name in ("model.restore_from_path", "export.save_path", "prune.drop_layers"):
        assert f"{name} is missing" in text


def test_distillation_without_a_teacher_is_for_the_control_only():
    model = schemas.ModelConfig(restore_from_path="/s", data=schemas.ModelDataConfig(data_prefix="/d"))
    assert all_problems(schemas.DistillConfig(model=model))
    assert not all_problems(schemas.DistillConfig(model=model, kd=schemas.KDConfig(kd_weight=0, lm_weight=1)))
    assert all_problems(schemas.KDConfig(kd_weight=0, lm_weight=0))


def test_random_weights_need_sizes_and_no_checkpoint():
    data = schemas.ModelDataConfig(data_prefix="/d")
    assert all_problems(schemas.FinetuneConfig(model=schemas.ModelConfig(init="random", data=data)))
    model = schemas.ModelConfig(init="random", architecture={"num_layers": 2}, data=data)
    assert not all_problems(schemas.FinetuneConfig(model=model))


def test_tensor_parallel_pruning_only_where_nothing_is_scored():
    assert not all_problems(pruned({"drop_layers": [16]}, tensor_model_parallel_size=8))
    messages = all_problems(pruned({"hidden_size": 256}, tensor_model_parallel_size=8))
    assert len(messages) == 1
    assert "pipeline_model_parallel_size" in messages[0]


def test_layers_are_named_or_chosen_not_both():
    assert "not both" in all_problems(pruned({"drop_layers": [1], "num_layers": 4}))[0]


def test_flow_students_have_known_targets():
    config = schemas.FlowPruneConfig(students={"wide": {"hidden": 3}})
    assert "students.wide.hidden is not a target" in config.problems()[0]
    assert "students is empty" in schemas.FlowPruneConfig().problems()[0]


@pytest.mark.parametrize(
    ("targets", "data", "method", "scores", "scan"),
    [
        ({"drop_layers": [1]}, None, "minitron", False, False),
        ({"drop_layers": [1]}, "data", "compensated", False, True),
        ({"drop_layers": [1], "method": "minitron"}, "data", "minitron", False, False),
        ({"num_layers": 2}, "data", "compensated", True, True),
        ({"num_layers": 2, "method": "minitron"}, "data", "minitron", True, False),
        ({"num_layers": 2, "method": "minitron", "depth_by": "block_loss"}, "data", "minitron", False, True),
        ({"hidden_size": 64}, None, "compensated", True, False),
        ({"num_layers": 2, "depth_by": "compensated_loss"}, "data", "compensated", False, True),
        ({"num_layers": 2, "hidden_size": 64, "depth_by": "compensated_loss"}, "data", "compensated", True, True),
    ],
)
def test_the_method_and_what_it_needs_follow_from_targets_and_data(targets, data, method, scores, scan):
    config = pruned(targets)
    config.model.data.data_prefix = data
    assert (config.method, config.prune.needs_scores, config.needs_scan) == (method, scores, scan)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"depth_by": "compensated"}, "block_loss, block_influence, compensated_loss"),
        ({"depth_by": "compensated_loss", "depth_beam": 0}, "depth_beam = 0"),
        ({"depth_by": "compensated_loss", "depth_samples": 0}, "depth_samples = 0"),
        ({"depth_by": "compensated_loss", "method": "minitron"}, "method = minitron leaves out"),
    ],
)
def test_depth_settings_that_cannot_be_are_refused(targets, said):
    (message,) = all_problems(schemas.PruneTargets(num_layers=2, **targets))
    assert said in message


@pytest.mark.parametrize("targets", [{"num_layers": 2}, {"drop_layers": [1], "method": "compensated"}])
def test_ranks_that_do_not_fill_the_stages_are_refused(targets):
    config = pruned(targets)
    config.trainer.devices, config.model.pipeline_model_parallel_size = 3, 2
    (message,) = config.problems()
    assert "world size 3" in message and "pipeline 2" in message


def test_a_method_that_is_none_is_refused_with_those_that_are():
    messages = all_problems(schemas.PruneTargets(drop_layers=[1], method="minitorn", depth_by="loss", ridge=2.0))
    assert len(messages) == 3 and "minitron, compensated" in messages[0] and "block_influence" in messages[1]
