"""One module that computes the loss of a batch, for loops that are not this package's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.divergences import Divergence
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.models.backbone import eval_mode
from kd_lightning.models.model_checks import check_causal
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.hf import as_teacher
from kd_lightning.training.student import StudentWithLoss


class DistillationStep(nn.Module):
    r"""Student, frozen teacher and loss in one forward: what DDP, FSDP2, Fabric and Accelerate wrap.

    The student is cut into body and LM head, labels are shifted, the teacher runs without gradient, and the loss is
    computed from hidden states (from whole logits where a model cannot be cut). The teacher is no submodule: its
    parameters are in no `state_dict` and no optimizer.

    Reduces to `distillation_loss(student(x).logits[:, :-1], teacher(x).logits[:, :-1], labels[:, 1:])`, undivided.

    Args:
        student: a Hugging Face causal LM, also one with adapters; it is trained.
        teacher: a causal LM, which is frozen, a `Teacher`, or a folder, hub name or `asset:` name; None: no teacher,
            for a loss with `ce_weight=1`.
        loss: a `DistillationLoss`, or any `Divergence` for one with its defaults.

    Raises:
        ValueError: the student is not a causal language model; student and teacher are one object.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from kd_lightning import DistillationStep, ForwardKL
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> student, ids = LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)), torch.tensor([[1, 2, 3]])
        >>> parts = DistillationStep(student, "asset:teacher", ForwardKL())(ids, labels=ids)
        >>> parts.divided().backward()
        >>> parts.divisor  # tokens that are predicted
        tensor(2.)
    """

    def __init__(
        self, student: nn.Module, teacher: Teacher | nn.Module | str | None, loss: DistillationLoss | Divergence
    ) -> None:
        super().__init__()
        loss = loss if isinstance(loss, DistillationLoss) else DistillationLoss(loss)
        model: Any = student
        with eval_mode(student):
            check_causal(model, "student")
            self.model = StudentWithLoss(student, loss)
        self.teacher = as_teacher(teacher)
        if self.teacher is not None:
            self.teacher.attach(RunContext(student=self.model, loss=loss))
            self.teacher.load()

    @property
    def student(self) -> nn.Module:
        """The student."""
        return self.model.student

    @property
    def loss(self) -> DistillationLoss:
        """The loss."""
        return self.model.loss

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> LossParts:
        """Undivided loss of a batch; `divided` makes a mean of it.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T]; None: nothing is padding.
            labels: [B, T], each at the position of its own token, as Hugging Face's models take them; −100: no label.
                They are shifted here.
            rows: other columns of the batch, [B, T] or [B], that objective or label loss read; also the teacher's own
                input (`teacher_input_ids`, `teacher_attention_mask`, `teacher_labels`).

        Raises:
            ValueError: there are no labels; shapes do not match.
        """
        if labels is None:
            raise ValueError("labels must be given: the tokens whose prediction is trained, −100 elsewhere; got None")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        teacher = self.teacher if self.loss.reads_teacher else None
        if teacher is not None:
            teacher.to(input_ids.device)
        batch = {**(rows or {}), "input_ids": input_ids, "attention_mask": mask, "labels": labels}
        parts: LossParts = self.model(batch, teacher)
        return parts
