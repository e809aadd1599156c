"""A teacher attached to a student and detached again leaves both models as they were."""

import dataclasses

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config import HiddenLossConfig, KDConfig
from nemo_minitron.distillation.attach import Distillation, pop_output
from nemo_minitron.megatron.layout import Layout

LAYOUT = Layout(cuda=False, bf16=False)


@pytest.fixture
def models(tiny, tmp_path):
    """A narrower student with random weights, the config of the teacher, and the teacher's checkpoint."""
    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.session import engine, model_config
    from nemo_minitron.megatron.weights import build_model

    teacher = open_checkpoint(tiny.teacher)
    narrow = dataclasses.replace(teacher.architecture, hidden_size=96, ffn_hidden_size=192)
    with engine(1, tmp_path / "log", cuda=False), parallel_ranks(LAYOUT, 1):
        student = build_model(model_config(narrow, LAYOUT), narrow, None)
        yield student, model_config(teacher.architecture, LAYOUT), teacher


def put_on(model) -> dict[str, tuple]:
    """Of each module: class, attributes, methods of its own, hooks, parameters and buffers themselves."""

    def parts(module):
        own = vars(module)
        hooks = {name: len(value) for name, value in own.items() if "hooks" in name and value is not None}
        tensors = {**module._parameters, **module._buffers}
        return type(module), set(own), hooks, list(module._modules), {name: id(one) for name, one in tensors.items()}

    return {name: (*parts(module), module.training) for name, module in model.named_modules()}


def inputs():
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], torch.arange(16).expand(2, 16), tokens[:, 1:]


def logits(model) -> torch.Tensor:
    tokens, positions, _ = inputs()
    with torch.no_grad():
        return model(tokens, positions, None)


HIDDEN = HiddenLossConfig(weight=1.0, scale="dynamic")


@pytest.mark.parametrize(
    ("kd", "pairs"),
    [
        (KDConfig(form="fused"), []),
        (KDConfig(form="chunked", lm_weight=0.5), []),
        (KDConfig(form="fused", lm_weight=0.5, hidden=HIDDEN), [(0, 0), (4, 4)]),
        (KDConfig(form="chunked", hidden=HIDDEN), [(2, 2), (3, 3)]),
    ],
    ids=["fused", "chunked", "fused and hidden", "chunked and hidden"],
)
def test_what_is_detached_is_what_was_attached_to(models, kd, pairs):
    student, config, teacher = models
    before, expected = put_on(student), logits(student)
    names = [name for name, _ in student.named_parameters()]
    distillation = Distillation(teacher, kd, pairs)
    model = distillation.attach(student, config)
    attached = distillation.attached.teacher
    plain_teacher = type(attached)
    assert model is student and put_on(student) != before
    model.set_student_input_tensor_shape([(16, 2, 96)])  # as NeMo does between pipeline stages

    tokens, positions, labels = inputs()
    batch = {"labels": labels, "loss_mask": torch.ones(2, 16)}
    losses = distillation.losses(batch, model(tokens, positions, None, labels=labels))
    losses.total.backward()
    assert tuple(losses.shown) == distillation.names and all(one.shape == (2, 16) for one in losses.shown.values())
    assert student.decoder.layers[0].mlp.linear_fc1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in attached.parameters())

    assert distillation.detach() is student
    assert put_on(student) == before and torch.equal(logits(student), expected)
    assert [name for name, _ in student.named_parameters()] == names
    assert type(attached) is plain_teacher and set(vars(attached)) == set(vars(student))
    assert logits(attached).shape == expected.shape
    assert not any("_intermediate_output" in vars(module) or module._forward_hooks for module in attached.modules())


def test_nothing_is_detached_twice_or_attached_twice(models):
    student, config, teacher = models
    distillation = Distillation(teacher, KDConfig())
    with pytest.raises(RuntimeError, match="no teacher is attached"):
        distillation.detach()
    distillation.attach(student, config)
    with pytest.raises(RuntimeError, match="attached already"):
        distillation.attach(student, config)
    distillation.detach()
    with pytest.raises(RuntimeError, match="no teacher is attached"):
        distillation.detach()


def test_an_output_is_popped_once():
    layer = torch.nn.Identity()
    layer._intermediate_output = "output"
    assert pop_output(layer) == "output" and pop_output(layer) is None
