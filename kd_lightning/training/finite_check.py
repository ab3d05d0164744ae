"""Stops a run whose loss is not finite, and says which of its terms is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.top_k import TopK
from kd_lightning.label_losses import CrossEntropy
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.batches import teacher_batch

Batch = Mapping[str, Tensor]
TERMS = ("kd", "ce")
ROWS = 256  # tokens whose logits are computed at a time
TEACHER = "the teacher's logits"
OTHER_DTYPE = "load the teacher in a dtype with a larger range (--model.teacher_kwargs.dtype float32)"
OTHER_STEP = "lower the learning rate, clip gradients, or check these rows, and resume"


@dataclass
class _MicroBatch:
    """What is kept of a micro-batch until its loss is checked."""

    step: int
    batch: Batch
    loss: Tensor
    values: dict[str, Tensor]


class NonFiniteLossCheck:
    """Stops a run whose loss is NaN or infinite; checked one step late, so that no step waits for the device."""

    def __init__(self) -> None:
        self._unchecked: _MicroBatch | None = None
        self._arrived: torch.cuda.Event | None = None

    def remember(self, step: int, batch: Batch, parts: LossParts) -> None:
        """Keep the loss of one micro-batch, with what explains it, until `check`."""
        loss = parts.loss
        values = {name: parts.values[name] for name in TERMS if name in parts.values}
        self._unchecked = _MicroBatch(step, batch, loss.detach().to("cpu", non_blocking=loss.is_cuda), values)
        if loss.is_cuda:  # reading the tensor would wait for everything queued since; not yet run on a GPU
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def check(
        self, locations: Callable[[list[int]], str], explain: Callable[[Batch, Mapping[str, Tensor]], str]
    ) -> None:
        """Check the loss that was kept.

        Args:
            locations: file and line of rows, for the message.
            explain: names the terms that are not finite, given the batch and its values; called only for a loss that
                is not finite.

        Raises:
            ValueError: it is NaN or infinite; the message has the step, the rows and the terms.
        """
        if self._unchecked is None:
            return
        kept, self._unchecked = self._unchecked, None
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        if not torch.isfinite(kept.loss):
            row_ids = kept.batch.get("row_ids")
            rows = "" if row_ids is None else f", on rows {locations(row_ids.tolist())}"
            terms = explain(kept.batch, kept.values)
            raise ValueError(
                f"the loss is {kept.loss.item()} at step {kept.step}{rows}: not finite: {terms}; checkpoints written "
                f"before it are kept: {OTHER_DTYPE if terms.startswith(TEACHER) else OTHER_STEP}"
            )


def non_finite_terms(
    loss: DistillationLoss,
    teacher: Teacher | None,
    batch: Batch,
    values: Mapping[str, Tensor],
    run_teacher: bool = True,
) -> str:
    """Which of teacher logits, student logits, divergence and label loss are not finite.

    The student is judged by its terms alone, because its weights may have changed since: both terms of a token are NaN
    if one of its logits is. The teacher is run again.

    Args:
        loss: that was computed.
        teacher: None: the loss does not use it.
        batch: that it was computed on.
        values: per token, [N]: "ce" (the label loss), and with a teacher "kd" (the divergence).
        run_teacher: False where this process cannot run the teacher alone, because models are sharded over ranks.

    Returns:
        Their names; the weighted sum, if each of them is finite.
    """
    ce_bad = ~torch.isfinite(values["ce"])
    kd = values.get("kd")
    kd_bad = ce_bad if kd is None else ~torch.isfinite(kd)
    teacher_finite: bool | None = True
    if teacher is not None and kd is not None:
        teacher_finite = _finite_logits(teacher, batch) if run_teacher else None
    terms = []
    if teacher_finite is False:
        terms.append(TEACHER)
    if (ce_bad & kd_bad).any():
        certain = kd is not None or isinstance(loss.token_loss.label_loss, CrossEntropy)
        terms.append("the student's logits" if certain else "the student's logits or the label loss")
    if (kd_bad & ~ce_bad).any() and teacher_finite is not False:
        terms.append("the divergence" if teacher_finite else f"{TEACHER} or the divergence")
    if (ce_bad & ~kd_bad).any():
        terms.append("the label loss")
    return ", ".join(terms) or "the weighted sum of the terms"


@torch.no_grad()
def _finite_logits(teacher: Teacher, batch: Batch) -> bool:
    """Whether the teachers' logits at the labels of their own input are finite.

    Logits of −inf are finite in this sense, because they exclude a token; at least one must be larger.
    """
    return all(_finite_share(share.teacher, teacher_batch(share.rows_of(batch))) for share in teacher.shares(batch))


def _finite_share(teacher: Teacher, batch: Batch) -> bool:
    labeled, head = next_token_mask(batch["labels"]), teacher.head
    if head is not None:
        hidden = teacher.hidden(batch)[:, :-1][labeled]
        with torch.autocast(hidden.device.type, enabled=False):  # as in the loss
            chunks = [head.logits(rows).amax(-1) for rows in torch.split(hidden, ROWS)]
    else:
        known = teacher.logits(batch)[:, :-1][labeled]
        chunks = [(known.log_probs if isinstance(known, TopK) else known).amax(-1)]
    return all(bool(torch.isfinite(top).all()) for top in chunks)
