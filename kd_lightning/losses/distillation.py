"""The distillation loss of a batch: label mask, shared vocabulary, and reduction over tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_lightning.divergences import Divergence
from kd_lightning.engine.chunked import ChunkedPass
from kd_lightning.engine.compile import opaque_to_compile
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import LabelMask
from kd_lightning.engine.logit_source import LogitSource
from kd_lightning.engine.sequence_stats import (
    baseline_columns,
    given_columns,
    label_columns,
    response_gap,
    response_means,
)
from kd_lightning.engine.token_loss import TokenLoss, score_name
from kd_lightning.engine.top_k import TopK
from kd_lightning.engine.validation import check_columns, check_devices, check_head, check_tokens, check_top_k
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.label_losses import CrossEntropy, LabelLoss
from kd_lightning.losses.arguments import check_aligned, check_loss_arguments, check_monitors
from kd_lightning.losses.batch import Alignment, Batch, Outputs
from kd_lightning.losses.loss_parts import LossParts
from kd_lightning.schedules import Schedule, Weight, check_flag


class DistillationLoss(nn.Module):
    r"""\(\ell = (1 - c)\,T^2 D(p, q) + c\,L(\log q_y)\) per token, summed over the tokens of a batch with a label.

    Reduces to the divergence alone at `ce_weight=0`, and to the label loss alone, without a teacher, at 1.
    Arithmetic is in fp32 at least, also under autocast; gradients have the inputs' dtype. They are computed in forward;
    a second backward over a retained graph computes everything again.

    Args:
        objective: D, any `Divergence`, also your own; its parameters get no gradient.
        ce_weight: c, the share of the label loss, in [0, 1], or a schedule.
        temperature: T in [0.001, 1000] divides both models' logits in D.
        reduction: "token_mean", "sequence_mean" (the mean over responses of their token means), "sum", or "none"
            (losses of tokens; backward computes everything again, with the schedules' values at that time).
        label_loss: L, evaluated at its own temperature; None: `CrossEntropy()`.
        square_temperature: whether D is multiplied by T², so that gradients keep their size.
        monitors: divergences reported in addition to the loss by name, at temperature 1, without gradient.
        diagnostics: whether to report "student_nll", "teacher_nll" and "agreement" (equal most probable tokens), and
            with a map of two vocabularies the probability that each model gives to the tokens of both.
        chunk: tokens whose logits are in memory at a time; None: chosen for speed within a budget of bytes.
        compile: True or False to force; None: chosen by the size of the first call with a gradient, and saved in the
            state, so that a resumed run computes the same bits. Without a compiler, or if the objective does not
            compile, everything runs eagerly after one warning.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> import torch
        >>> from kd_lightning import DistillationLoss, ForwardKL
        >>> student, teacher = torch.tensor([[[0.25, 0.75]] * 2, [[0.5, 0.5]] * 2]).log()
        >>> loss = DistillationLoss(ForwardKL(), ce_weight=0.5)
        >>> loss.from_logits(student, teacher, torch.tensor([0, -100])).mean  # ½ · 0.1438 + ½ · log 4
        tensor(0.7651)
    """

    def __init__(
        self,
        objective: Divergence,
        ce_weight: Weight = 0.0,
        temperature: float = 1.0,
        reduction: str = "token_mean",
        label_loss: LabelLoss | None = None,
        square_temperature: bool = True,
        monitors: Mapping[str, Divergence] | None = None,
        diagnostics: bool = False,
        chunk: int | None = None,
        compile: bool | None = None,
    ) -> None:
        super().__init__()
        check_loss_arguments(
            objective, ce_weight, temperature, reduction, label_loss, square_temperature, chunk, compile
        )
        check_flag("diagnostics", diagnostics)
        self.reduction = reduction
        self.chunk = chunk
        self.token_loss = TokenLoss(
            objective,
            CrossEntropy() if label_loss is None else label_loss,
            ce_weight,
            temperature,
            square_temperature,
            check_monitors(monitors),
            diagnostics,
            compile,
        )

    @property
    def objective(self) -> Divergence:
        """D, the training objective."""
        return self.token_loss.objective

    @property
    def ce_weight(self) -> Weight:
        """c, the share of the label loss: a number or a schedule."""
        return self.token_loss.ce_weight

    def schedules(self) -> dict[str, Schedule]:
        """Every schedule by its dotted path in the objective (or `ce_weight`)."""
        found = {name: part for name, part in self.objective.named_modules() if isinstance(part, Schedule)}
        return found | ({"ce_weight": self.ce_weight} if isinstance(self.ce_weight, Schedule) else {})

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss depends on the teacher: not at `ce_weight=1` with a label loss that reads nothing of it."""
        labels_only = not isinstance(self.ce_weight, Schedule) and self.ce_weight == 1
        return not labels_only or bool(self.token_loss.label_loss.columns)

    @opaque_to_compile
    def from_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopK | None,
        labels: Tensor,
        rows: Mapping[str, Tensor] | None = None,
        teacher_labels: Tensor | None = None,
        vocabulary_map: VocabularyMap | None = None,
        teacher_positions: Tensor | None = None,
    ) -> LossParts:
        """Loss from logits.

        Args:
            student_logits: [B, T, V] (or [T, V]), before any temperature.
            teacher_logits: [B, T, Vt] ([B, T', Vt] with `teacher_labels` or `teacher_positions`); if Vt differs from V
                (padding), both are cut to the shared vocabulary and normalized again. `TopK`: top-k log-probabilities.
                None: no teacher, with `ce_weight=1`.
            labels: integers [B, T] (or [T]: one response), aligned with the logits; −100: no label.
            rows: extra inputs per token of the objective and the label loss, [B, T], or [B] for all tokens of a
                response.
            teacher_labels: labels [B, T'] in the teacher's own input, as many in each response as in `labels`: the
                k-th of a response is the same token on both sides. None: `labels`. With `teacher_positions` they are
                the teacher's own tokens, any number of them, and read by `ChunkLikelihood` alone.
            vocabulary_map: the tokens that both models share, if their tokenizers differ. A label without a partner
                counts in the label loss alone. None: token v is the same in both.
            teacher_positions: integers [B, T], aligned with the labels: the teacher's position, in [0, T'), whose
                distribution the student's is compared with; −1: none. Such tokens add 0 to the divergence and its
                monitors, and count in the divisor. None: those of the labels.

        Raises:
            ValueError: shapes, devices, labels or positions do not match; with a map, the objective, a monitor or the
                label loss cannot be computed.

        Examples:
            >>> import torch
            >>> from kd_lightning import DistillationLoss, ForwardKL, TotalVariation
            >>> student, teacher = torch.tensor([[[0.25, 0.75]] * 2, [[0.5, 0.5]] * 2]).log()
            >>> loss = DistillationLoss(ForwardKL(), monitors={"tv": TotalVariation()})
            >>> loss.from_logits(student, teacher, torch.tensor([0, -100])).values
            {'loss': tensor([0.1438]), 'kd': tensor([0.1438]), 'ce': tensor([1.3863]), 'tv': tensor([0.2500])}
        """
        check_tokens("student_logits", student_logits, labels)
        alignment = Alignment(teacher_labels, vocabulary_map, teacher_positions)
        teacher: Outputs | TopK | None = None
        if isinstance(teacher_logits, TopK):
            teacher = _checked(teacher_logits, "teacher_logits", student_logits.shape[-1], labels, alignment)
        elif teacher_logits is not None:
            tokens = alignment.tokens("teacher_logits", teacher_logits, labels)
            check_tokens("teacher_logits", teacher_logits, tokens)
            # `detach` shares its version counter with the user's tensor, by which a recomputation notices a change
            teacher = Outputs(teacher_logits.detach())
        return self._compute(Batch(Outputs(student_logits), teacher, labels, alignment), rows)

    @opaque_to_compile
    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Head | Tensor,
        teacher_hidden: Tensor | TopK | None,
        teacher_head: Head | Tensor | None,
        labels: Tensor,
        rows: Mapping[str, Tensor] | None = None,
        teacher_labels: Tensor | None = None,
        vocabulary_map: VocabularyMap | None = None,
        teacher_positions: Tensor | None = None,
    ) -> LossParts:
        """Loss from hidden states, without materializing the logits of all tokens.

        The gradient is computed in the same pass. On a GPU the host waits only for the number of labels, and for the
        check of `teacher_positions`. A schedule that reads the responses' log-probabilities, and `ChunkLikelihood`,
        cost a second projection of both models.

        Args:
            student_hidden: [B, T, H] (or [T, H]), after the last norm.
            student_head: a weight [V, H], or a `Head`.
            teacher_hidden: [B, T, Ht] ([B, T', Ht] with `teacher_labels` or `teacher_positions`); `TopK`: top-k
                log-probabilities, without a head; None: no teacher, with `ce_weight=1`.
            teacher_head: a weight [Vt, Ht], or a `Head`.
            labels: as in `from_logits`.
            rows: as in `from_logits`.
            teacher_labels: as in `from_logits`.
            vocabulary_map: as in `from_logits`.
            teacher_positions: as in `from_logits`.

        Raises:
            ValueError: as in `from_logits`.

        Examples:
            >>> import torch
            >>> from kd_lightning import DistillationLoss, ForwardKL
            >>> student, teacher = torch.tensor([[[0.25, 0.75]] * 2, [[0.5, 0.5]] * 2]).log()
            >>> loss, head = DistillationLoss(ForwardKL()), torch.eye(2)  # logits are the hidden states
            >>> loss.from_hidden(student, head, teacher, head, torch.tensor([0, -100])).mean
            tensor(0.1438)
        """
        head = check_head("student", student_hidden, student_head, labels)
        alignment = Alignment(teacher_labels, vocabulary_map, teacher_positions)
        teacher: Outputs | TopK | None = None
        if isinstance(teacher_hidden, TopK):
            teacher = _checked(teacher_hidden, "teacher_hidden", head.vocabulary, labels, alignment)
        elif teacher_hidden is not None:
            tokens = alignment.tokens("teacher_hidden", teacher_hidden, labels)
            other = check_head("teacher", teacher_hidden, teacher_head, tokens)
            teacher = Outputs(teacher_hidden.detach(), other)
        return self._compute(Batch(Outputs(student_hidden, head), teacher, labels, alignment), rows)

    def _compute(self, batch: Batch, rows: Mapping[str, Tensor] | None) -> LossParts:
        """Run the pass over the tokens with a label and reduce."""
        student, teacher, mask = batch.student, batch.teacher, batch.mask
        self._check_teacher(teacher)
        check_devices(student=student.inputs, teacher=teacher.inputs if teacher else (), labels=(mask.index,))
        inputs = [x for model in (student, teacher) if model for x in model.inputs if x is not None]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
        rows = check_columns(rows)
        if batch.is_aligned:
            check_aligned(self.token_loss, rows, batch.merges)
        columns, pairs = self._columns(batch, rows, dtype), batch.pairs()
        known = columns | pairs | {"labels": mask.labels}
        chunked = ChunkedPass(self.token_loss, student, teacher, known, self.chunk)
        weights, divisor = self._weights(mask, dtype)
        if self.reduction == "none":
            losses = chunked.loss(weights, summed=False)
            loss = losses.new_zeros(mask.shape.numel()).index_copy(0, mask.index, losses).view(mask.shape)
        else:
            loss = chunked.loss(weights)
        values = chunked.values | {name: paired.to(dtype) for name, paired in pairs.items()}
        weighted = {} if teacher is None else self.objective.weighted()
        token_weights = {path: x.weight_sums(values.pop(score_name(path))) for path, x in weighted.items()}
        if (gap := response_gap(columns)) is not None:
            values["gap"] = gap
        means = {} if teacher is None else response_means(self.token_loss, mask, columns)
        return LossParts(loss, divisor, weights, values, means, token_weights=token_weights, reduction=self.reduction)

    def _check_teacher(self, teacher: LogitSource | None) -> None:
        if teacher is not None:
            return
        if self.ce_weight != 1:
            raise ValueError(f"ce_weight must be 1 without a teacher, got {self.ce_weight}")
        if self.token_loss.monitors:
            raise ValueError(f"monitors need a teacher, got none: remove {', '.join(self.token_loss.monitors)}")

    def _columns(self, batch: Batch, rows: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Extra inputs of the tokens with a label, [N] each, with those that the loss computes for its parts."""
        columns = {name: batch.mask.column(name, values, dtype) for name, values in rows.items()}
        if batch.teacher is None:
            return columns
        arguments = (self.token_loss, batch.student, batch.teacher, batch.mask, columns, dtype, self.chunk)
        columns |= given_columns(columns) | label_columns(*arguments) | baseline_columns(*arguments)
        if self.token_loss.reads_chunks:
            columns |= batch.chunk_columns(self.token_loss.temperature, dtype, self.chunk)
        return columns

    def _weights(self, mask: LabelMask, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights of the tokens with a label, [N], and the divisor, 0-d, of the reduction."""
        ones = torch.ones(len(mask.index), dtype=dtype, device=mask.index.device)
        if self.reduction == "sequence_mean":
            return ones / mask.lengths[mask.response], (mask.lengths > 0).sum().to(dtype)
        divisor = mask.lengths.sum().to(dtype) if self.reduction == "token_mean" else ones.new_ones(())
        return ones, divisor


def _checked(known: TopK, name: str, vocabulary: int, labels: Tensor, alignment: Alignment) -> TopK:
    """A teacher's top k that matches the labels and, without a map, the student's vocabulary."""
    tokens = alignment.tokens(name, known.log_probs, labels)
    check_top_k(known, vocabulary if alignment.vocabulary_map is None else None, tokens)
    return known
