"""A teacher attached to a student's Megatron model, and taken off again.

Legend: s sequence, b micro batch, v vocabulary rows of this rank, h hidden (student's), g hidden (teacher's).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import KDConfig
from nemo_minitron.distillation.criteria import OUTPUT_LAYER, hidden_criteria, logits_criterion
from nemo_minitron.distillation.layer_pairs import Pair
from nemo_minitron.distillation.losses.api import KD_LOSS
from nemo_minitron.distillation.losses.hidden import loss_name, scaled_weights, with_hidden
from nemo_minitron.distillation.on_hidden import fused_losses, fuses, pass_hidden_states_on
from nemo_minitron.megatron.chunks import output_weight
from nemo_minitron.megatron.weights import build_model
from nemo_minitron.training.losses import LM_LOSS, Batch, Losses, weighed

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from nemo.collections.llm import GPTConfig
    from torch import Tensor
    from torch.nn import Module

    from nemo_minitron.distillation.kept import KeptTargets
    from nemo_minitron.distillation.losses.targets import Sparse

#: What ModelOpt, NeMo and this class put on the student itself, much of it over the methods of its class.
STUDENT_ATTRIBUTES = (
    "forward",
    "sharded_state_dict",
    "compute_language_model_loss",
    "set_input_tensor",
    "set_student_input_tensor_shape",
    "_tensor_split_idx",
    "_modelopt_state_version",
)
#: And on the teacher.
TEACHER_ATTRIBUTES = ("compute_language_model_loss",)
#: Fields of a config that student and teacher have alike.
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
)
#: Where ModelOpt's hooks keep what a layer put out in the last forward pass.
OUTPUT = "_intermediate_output"


class Distillation:
    """The distillation of one student: ModelOpt's DistillationModel with NeMo's methods for Megatron, and ours.

    All that is put on the two models is put on in `attach` and taken off in `detach`; every private name of ModelOpt
    and NeMo that this touches stands in this file.

    Args:
        checkpoint: the teacher's.
        kd: the losses, their form and weights.
        pairs: layers of student and teacher whose hidden states are compared.
        share: of this teacher, where the answers of others are `kept`.

    Attributes:
        names: of the losses, in the order in which they are shown.
        weights: of each loss in the sum that is trained on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kd: KDConfig,
        pairs: Sequence[Pair] = (),
        kept: "KeptTargets | None" = None,
        share: float = 1.0,
    ):
        self.checkpoint, self.kd, self.pairs = checkpoint, kd, pairs
        self.kept, self.share = kept, share
        self.hidden_names = [loss_name(kd.hidden, pair) for pair in pairs]
        self.names = (KD_LOSS, LM_LOSS, *self.hidden_names)
        self.weights = {KD_LOSS: kd.kd_weight, LM_LOSS: kd.lm_weight}
        self.weights |= {name: kd.hidden.weight / len(pairs) for name in self.hidden_names}
        self._attached: _Attached | None = None

    def weights_at(self, means: Mapping[str, float]) -> dict[str, float]:
        """The weight of each loss in a step whose losses have these means."""
        return scaled_weights(self.weights, means, self.hidden_names, self.kd.hidden)

    def attach(self, student: "GPTModel", config: "GPTConfig") -> "GPTModel":
        """Makes `student`, in place, a model whose forward pass runs the frozen teacher as well; returns it.

        Args:
            config: the teacher's; it is given the student's layout.
        """
        import modelopt.torch.distill as mtd
        from nemo.collections.llm.modelopt.distill.utils import DistillationConfig, adjust_distillation_model_for_mcore

        if self._attached is not None:
            raise RuntimeError("a teacher is attached already; detach it first")
        for name in LAYOUT:
            setattr(config, name, getattr(student.config, name))
        criteria = {(OUTPUT_LAYER, OUTPUT_LAYER): logits_criterion(self.kd)}
        criteria |= hidden_criteria(self.kd.hidden, self.pairs, student.config.hidden_size, config.hidden_size)
        settings = DistillationConfig(criterion=criteria if student.post_process else {}, skip_lm_loss=False)
        # ModelOpt wants a balancer where there are several losses; here they are weighed over a whole batch.
        balancer = mtd.StaticLossBalancer(1.0) if len(settings.criterion) > 1 else None
        mode = {
            "teacher_model": (build_model, [config, self.checkpoint.architecture, self.checkpoint], {}),
            "criterion": settings.criterion,
            "loss_balancer": balancer,
        }
        model = mtd.convert(student, mode=[("kd_loss", mode)])
        adjust_distillation_model_for_mcore(model, distill_cfg=settings)
        model.forward = _teacher_then_student(model)
        fused = model.post_process and fuses(self.kd, sequence_parallel=student.config.sequence_parallel)
        if fused:
            pass_hidden_states_on(model, model.teacher_model)
        else:
            model.compute_language_model_loss = loss_on_a_copy(model, trained_on=self.kd.lm_weight > 0)
        self._attached = _Attached(model, model.teacher_model, fused)
        return model

    @property
    def attached(self) -> "_Attached":
        """What `attach` made; raises RuntimeError where no teacher is attached."""
        if self._attached is None:
            raise RuntimeError("no teacher is attached to a student")
        return self._attached

    def losses(self, batch: Batch, output: "Tensor") -> Losses:
        """The losses of the forward pass that has just run, on the last pipeline stage.

        Args:
            output: of the student, its language-model loss a token [b, s].
        """
        mask = batch["loss_mask"].float()  # [b, s]
        on_logits, *on_hidden = self.attached.criteria().items()
        hidden = {name: _popped_loss(*criterion) for name, criterion in zip(self.hidden_names, on_hidden)}
        if self.attached.fused:
            losses = self._fused_losses(batch)
        else:
            losses = weighed({KD_LOSS: _popped_loss(*on_logits), LM_LOSS: output}, self.weights, mask)
        return with_hidden(losses, hidden, mask, self.kd.hidden) if hidden else losses

    def _fused_losses(self, batch: Batch) -> Losses:
        """The losses on logits from what the output layers were given."""
        from nemo_minitron.distillation.losses.targets import Dense

        student, teacher, _ = self.attached
        hidden, target = (pop_output(one.output_layer)[0] for one in (student, teacher))  # [s, b, h], [s, b, g]
        answers = [Dense(target.flatten(0, 1), output_weight(teacher), self.share)]
        sparse: list[Sparse] = []
        if self.kept is not None:
            answers += self.kept.dense(batch, hidden)
            sparse = self.kept.sparse(batch)
        return fused_losses(self.kd, batch, hidden, output_weight(student), answers, sparse)

    def detach(self) -> "GPTModel":
        """Takes off all that `attach` put on: the student's own model, with the weights that it has now.

        Raises:
            RuntimeError: no teacher is attached.
        """
        student, teacher, _ = self.attached
        layers = [layer for pair in self.attached.criteria() for layer in pair]
        for model, names in ((student, STUDENT_ATTRIBUTES), (teacher, TEACHER_ATTRIBUTES)):
            for name in names:
                model.__dict__.pop(name, None)
            if model.post_process:
                model.output_layer.__dict__.pop("forward", None)
        student.export()  # ModelOpt's: its class, hooks, and what is in its modules' lists
        for layer in layers:
            layer.__dict__.pop(OUTPUT, None)
        self._attached = None
        return student


class _Attached(NamedTuple):
    """The two models while they are together.

    Attributes:
        student: ModelOpt's DistillationModel, the very object that was given to `attach`.
        teacher: frozen.
        fused: whether the output layers only hand on the hidden states that they are given.
    """

    student: "GPTModel"
    teacher: "GPTModel"
    fused: bool

    def criteria(self) -> "dict[tuple[Module, Module], Module]":
        """(student's layer, teacher's) -> criterion, on logits, then on hidden states; on the last stage alone."""
        criteria: dict[tuple[Module, Module], Module] = self.student._layers_to_loss
        return criteria


def pop_output(layer: "Module") -> Any:
    """What a layer put out in this forward pass, which ModelOpt's hooks kept, and keep no more."""
    output = getattr(layer, OUTPUT)
    setattr(layer, OUTPUT, None)
    return output


def _popped_loss(layers: "tuple[Module, Module]", criterion: "Module") -> "Tensor":
    """A criterion's loss a token [b, s] of what the student's layer and the teacher's put out."""
    own, other = layers
    loss: Tensor = criterion(pop_output(own), pop_output(other))
    return loss


def _teacher_then_student(model: "GPTModel") -> Callable[..., "Tensor"]:
    """The forward pass in training and validation alike; NeMo's runs the teacher in training only.

    Between pipeline stages the activations of both travel side by side.
    """
    import torch

    def forward(*args: Any, **kwargs: Any) -> "Tensor":
        with torch.no_grad():
            model._teacher_model.eval()
            teacher_output = model._teacher_model(*args, **kwargs)
        with model.only_student_forward():
            student_output: Tensor = type(model).forward(model, *args, **kwargs)
        return student_output if model.post_process else torch.cat([student_output, teacher_output], dim=-1)

    return forward


def loss_on_a_copy(model: "GPTModel", trained_on: bool) -> Callable[..., "Tensor"]:
    """The student's language-model loss on a copy of its logits.

    Megatron's cross entropy works in place on fp32 logits, and the distillation loss puts its gradient in their place.
    Where the loss is only shown and not trained on, no gradient is kept.
    """

    def loss(labels: "Tensor", logits: "Tensor") -> "Tensor":  # [b, s], [s, b, v] -> [b, s]
        own = logits if trained_on else logits.detach()
        value: Tensor = type(model).compute_language_model_loss(model, labels, own.clone())
        return value

    return loss
