"""The distillation loss as functions, from logits or from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from kd_lightning.divergences import Divergence
from kd_lightning.engine.compile import opaque_to_compile
from kd_lightning.engine.head import Head
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses.arguments import check_loss_arguments
from kd_lightning.losses.distillation import DistillationLoss
from kd_lightning.losses.loss_parts import LossParts
from kd_lightning.schedules import Weight


@opaque_to_compile
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    objective: Divergence,
    ce_weight: Weight = 0.0,
    temperature: float = 1.0,
    reduction: str = "token_mean",
    rows: Mapping[str, Tensor] | None = None,
    label_loss: LabelLoss | None = None,
    square_temperature: bool = True,
    teacher_labels: Tensor | None = None,
    vocabulary_map: VocabularyMap | None = None,
    teacher_positions: Tensor | None = None,
) -> Tensor:
    r"""Distillation loss from the logits of both models; 0 without labels.

    Args:
        student_logits: [B, T, V] (or [T, V]), aligned with the labels (they are not shifted here).
        teacher_logits: [B, T, Vt]; None: no teacher, with `ce_weight=1`.
        labels: integers [B, T]; −100: no label.
        objective: any `Divergence`.
        ce_weight: share of the label loss, in [0, 1].
        temperature: divides both models' logits in the divergence, in [0.001, 1000].
        reduction: "token_mean", "sequence_mean", "sum", or "none" (losses in the shape of the labels).
        rows: extra inputs per token of the objective and the label loss, [B, T] or [B].
        label_loss: the loss on the label's log-probability; None: `CrossEntropy()`.
        square_temperature: whether the divergence is multiplied by T².
        teacher_labels: labels [B, T'] in the teacher's own input; the k-th of a row is the same token on both sides.
            None: `labels`. With `teacher_positions` the teacher's own tokens, read by `ChunkLikelihood` alone.
        vocabulary_map: the tokens that both models share; None: token v is the same in both.
        teacher_positions: integers [B, T]: the teacher's position that a token with a label is compared with; −1: none,
            and its divergence is 0. None: those of the labels.

    Returns:
        The loss, 0-d; [B, T] with reduction "none".

    Raises:
        ValueError: an argument is out of range, or shapes do not match.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, distillation_loss
        >>> student, teacher = torch.tensor([[[0.25, 0.75]] * 2, [[0.5, 0.5]] * 2]).log()
        >>> distillation_loss(student, teacher, torch.tensor([0, -100]), objective=ForwardKL())
        tensor(0.1438)
    """
    settings = (objective, ce_weight, temperature, reduction, label_loss, square_temperature)
    loss = _loss(*settings, chunk=None, compile=False)
    alignment = (teacher_labels, vocabulary_map, teacher_positions)
    return _reduced(loss.from_logits(student_logits, teacher_logits, labels, rows, *alignment), reduction)


@opaque_to_compile
def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | Tensor | None,
    labels: Tensor,
    *,
    objective: Divergence,
    ce_weight: Weight = 0.0,
    temperature: float = 1.0,
    reduction: str = "token_mean",
    rows: Mapping[str, Tensor] | None = None,
    label_loss: LabelLoss | None = None,
    square_temperature: bool = True,
    chunk: int | None = None,
    compile: bool | None = None,
    teacher_labels: Tensor | None = None,
    vocabulary_map: VocabularyMap | None = None,
    teacher_positions: Tensor | None = None,
) -> Tensor:
    r"""`distillation_loss`, equal in value and gradient, from hidden states: no logits of all tokens in memory.

    Args:
        student_hidden: [B, T, H] (or [T, H]), aligned with the labels.
        student_head: a weight [V, H], or a `Head`.
        teacher_hidden: [B, T, Ht]; None: no teacher, with `ce_weight=1`.
        teacher_head: a weight [Vt, Ht], or a `Head`.
        labels: integers [B, T]; −100: no label.
        objective: any `Divergence`; the other arguments as in `distillation_loss`.
        ce_weight: share of the label loss.
        temperature: divides both models' logits in the divergence.
        reduction: the reduction over tokens.
        rows: extra inputs per token.
        label_loss: the loss on the label's log-probability.
        square_temperature: whether the divergence is multiplied by T².
        chunk: tokens whose logits are in memory at a time; None: within a budget of bytes.
        compile: as in `DistillationLoss`; all calls with the same `objective` object share one compilation.
        teacher_labels: as in `distillation_loss`.
        vocabulary_map: as in `distillation_loss`.
        teacher_positions: as in `distillation_loss`.

    Returns:
        The loss, 0-d; [B, T] with reduction "none".

    Raises:
        ValueError: an argument is out of range, or shapes do not match.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, fused_distillation_loss
        >>> (student, teacher), head = torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]]).log(), torch.eye(2)
        >>> fused_distillation_loss(student, head, teacher, head, torch.tensor([0]), objective=ForwardKL())
        tensor(0.1438)
    """
    settings = (objective, ce_weight, temperature, reduction, label_loss, square_temperature)
    loss = _loss(*settings, chunk=chunk, compile=compile)
    models = (student_hidden, student_head, teacher_hidden, teacher_head)
    parts = loss.from_hidden(*models, labels, rows, teacher_labels, vocabulary_map, teacher_positions)
    return _reduced(parts, reduction)


_cached = functools.lru_cache(maxsize=16)(DistillationLoss)  # keeps the compiled loss between calls


def _loss(
    objective: Divergence,
    ce_weight: Weight,
    temperature: float,
    reduction: str,
    label_loss: LabelLoss | None,
    square_temperature: bool,
    chunk: int | None,
    compile: bool | None,
) -> DistillationLoss:
    settings = (objective, ce_weight, temperature, reduction, label_loss, square_temperature)
    check_loss_arguments(*settings, chunk, compile)  # before the cache, which needs arguments that can be hashed
    return _cached(*settings, chunk=chunk, compile=compile)


def _reduced(parts: LossParts, reduction: str) -> Tensor:
    return parts.loss if reduction in ("sum", "none") else parts.mean
