"""Distillation on teachers' answers that are kept: what is put on a student's model, and taken off again.

Legend: s sequence, b micro batch, t = s b tokens, v vocabulary rows of this rank, g hidden (teacher's), k entries.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import KDConfig
from nemo_minitron.data.blend import Blend
from nemo_minitron.data.sample_sets import Piece
from nemo_minitron.distillation.attach import loss_on_a_copy
from nemo_minitron.distillation.criteria import vocabulary_group
from nemo_minitron.distillation.losses.api import KD_LOSS
from nemo_minitron.distillation.on_hidden import fused_losses, fuses
from nemo_minitron.distillation.teach.folder import Together
from nemo_minitron.megatron.chunks import output_weight
from nemo_minitron.training.losses import LM_LOSS, Batch, Losses, weighed

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

    from nemo_minitron.distillation.losses.targets import Dense, Sparse


class KeptTargets:
    """The answers of one or several teachers, from their folders into a batch, and from a batch to the losses.

    Args:
        teachers: their answers.
        shares: of each.
    """

    def __init__(self, teachers: Sequence[Together], shares: Sequence[float]):
        self.teachers, self.shares = teachers, shares
        self._matrices: dict[int, Tensor] = {}

    def fields(self, pieces: Sequence[Piece], length: int) -> "dict[str, Tensor]":
        """The fields of a sample's batch: `kept<number of the teacher>_<name>` [s, ..]."""
        return {
            f"kept{number}_{name}": value
            for number, teacher in enumerate(self.teachers)
            for name, value in teacher.sample(pieces, length).items()
        }

    def dense(self, batch: Batch, like: "Tensor") -> "list[Dense]":
        """The teachers of whom hidden states are kept, [t, g] in the order of [s, b].

        Args:
            like: has the dtype and the device that logits are worked out in.
        """
        from nemo_minitron.distillation.losses.targets import Dense

        return [
            Dense(_by_token(batch[f"kept{number}_hidden"]).to(like.dtype), self._matrix(number, like), share)
            for number, (teacher, share) in enumerate(zip(self.teachers, self.shares))
            if teacher.header.keep == "hidden"
        ]

    def sparse(self, batch: Batch) -> "list[Sparse]":
        """The teachers of whom entries are kept, [t, k] in the order of [s, b]."""
        from nemo_minitron.distillation.losses.targets import Sparse

        found = []
        for number, (teacher, share) in enumerate(zip(self.teachers, self.shares)):
            if teacher.header.keep == "hidden":
                continue
            names = ("entries", "probabilities", "rest", "entropy")
            entries, probabilities, rest, entropy = (
                _by_token(batch[f"kept{number}_{name}"]) if f"kept{number}_{name}" in batch else None for name in names
            )
            assert entries is not None and probabilities is not None and entropy is not None
            used = max(1, int((probabilities > 0).sum(dim=-1).max())) if rest is None else entries.shape[1]
            found.append(Sparse(entries[:, :used].long(), probabilities[:, :used], rest, entropy, share))
        return found

    def _matrix(self, number: int, like: "Tensor") -> "Tensor":
        """This rank's rows of a teacher's output matrix [v, g], on the device once."""
        if number not in self._matrices:
            from megatron.core import parallel_state

            ranks = parallel_state.get_tensor_model_parallel_world_size()
            teacher = self.teachers[number]
            rows = teacher.header.vocab_size // ranks
            part = teacher.output_matrix(rows * parallel_state.get_tensor_model_parallel_rank(), rows)
            self._matrices[number] = part.to(device=like.device, dtype=like.dtype)
        return self._matrices[number]

    def losses_by_source(self, validation: Blend, numbers: Sequence[int]) -> list[float]:
        """The teachers' own mean loss of the learnt labels of these samples, by source [k], in nats.

        Of several teachers it is the mean by their shares.
        """
        import torch

        sums = torch.zeros(len(validation.names), 2, dtype=torch.float64)
        for number in numbers:
            for piece in validation[number]:
                learnt = torch.as_tensor(piece.learnt)[1:].double()
                losses = [teacher.loss(piece) * share for teacher, share in zip(self.teachers, self.shares)]
                loss = torch.stack(losses).sum(0) / sum(self.shares)
                sums[validation.source(number)] += torch.stack([(loss * learnt).sum(), learnt.sum()])
        return (sums[:, 0] / sums[:, 1]).tolist()

    def let_go(self) -> None:
        """Frees what lies on the device."""
        self._matrices.clear()


def _by_token(field: "Tensor") -> "Tensor":
    """[b, s, ..] as [t, ..] in the order of [s, b]."""
    return field.transpose(0, 1).flatten(0, 1)


class KeptDistillation:
    """The distillation of one student on answers that are kept; the interface is `Distillation`'s.

    Args:
        targets: the teachers' answers.
        kd: the losses, their form and weights.

    Attributes:
        kept: `targets`.
        names: of the losses, in the order in which they are shown.
        weights: of each loss in the sum that is trained on.
    """

    names = (KD_LOSS, LM_LOSS)

    def __init__(self, targets: KeptTargets, kd: KDConfig):
        self.kept, self.kd = targets, kd
        self.weights = {KD_LOSS: kd.kd_weight, LM_LOSS: kd.lm_weight}
        self._student: GPTModel | None = None
        self._output: list[Tensor] = []
        self._fused = False

    def weights_at(self, means: Mapping[str, float]) -> dict[str, float]:
        """The weight of each loss in a step whose losses have these means."""
        return self.weights

    def attach(self, student: "GPTModel") -> "GPTModel":
        """Makes `student`, in place, keep what the losses on its logits need; returns it."""
        if self._student is not None:
            raise RuntimeError("a student is attached already; detach it first")
        self._student = student
        self._fused = fuses(self.kd, sequence_parallel=student.config.sequence_parallel)
        if student.post_process:
            if self._fused:
                student.output_layer.forward = lambda hidden, *arguments, **named: (hidden, None)
            student.compute_language_model_loss = self._keeping(student)
        return student

    def _keeping(self, student: "GPTModel") -> Any:
        """The student's language-model loss [b, s], which keeps what it is worked out from."""
        plain = loss_on_a_copy(student, trained_on=self.kd.lm_weight > 0)

        def loss(labels: "Tensor", output: "Tensor") -> "Tensor":  # hidden states or logits [s, b, ..]
            self._output = [output]
            return output.new_zeros(labels.shape) if self._fused else plain(labels, output)

        return loss

    def losses(self, batch: Batch, output: "Tensor") -> Losses:
        """The losses of the forward pass that has just run, on the last pipeline stage.

        Args:
            output: of the student, its language-model loss a token [b, s].
        """
        assert self._student is not None, "a student is attached"
        own = self._output.pop()
        dense, sparse = self.kept.dense(batch, own), self.kept.sparse(batch)
        if self._fused:
            return fused_losses(self.kd, batch, own, output_weight(self._student), dense, sparse)
        value = self._on_logits(own, dense, sparse)
        return weighed({KD_LOSS: value, LM_LOSS: output}, self.weights, batch["loss_mask"].float())

    def _on_logits(self, logits: "Tensor", dense: "Sequence[Dense]", sparse: "Sequence[Sparse]") -> "Tensor":
        """The divergence a token [b, s] from the student's logits [s, b, v]."""
        from nemo_minitron.distillation.losses import api

        kd, shape = self.kd, logits.shape[:2]
        options: dict[str, Any] = {
            "temperature": kd.temperature,
            "group": vocabulary_group(),
            "overwrite_student": bool(dense) + len(sparse) == 1,
        }
        total = sum(one.share for one in dense) + sum(one.share for one in sparse)
        values = []
        if dense:
            teachers = [(one.hidden @ one.weight.t()).view(*shape, -1) for one in dense]
            shares = [one.share for one in dense]
            target = api.mixture(teachers, shares, temperature=kd.temperature, group=options["group"])
            value = api.divergence(logits, target, kd.loss, beta=kd.beta, times_t_squared=kd.times_t_squared, **options)
            values.append(value * (sum(shares) / total))
        for one in sparse:
            shaped = one._replace(
                entries=one.entries.view(*shape, -1),
                probabilities=one.probabilities.view(*shape, -1),
                rest=None if one.rest is None else one.rest.view(shape),
                entropy=one.entropy.view(shape),
            )
            values.append(api.sparse_divergence(logits, shaped, kd.loss, **options) * (one.share / total))
        value, *others = values
        return sum(others, start=value).transpose(0, 1)

    def detach(self) -> "GPTModel":
        """Takes off all that `attach` put on: the student's own model, with the weights that it has now.

        Raises:
            RuntimeError: no student is attached.
        """
        if self._student is None:
            raise RuntimeError("no student is attached")
        student, self._student = self._student, None
        student.__dict__.pop("compute_language_model_loss", None)
        if student.post_process:
            student.output_layer.__dict__.pop("forward", None)
        self._output.clear()
        self.kept.let_go()
        return student
