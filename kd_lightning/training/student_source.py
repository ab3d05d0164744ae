"""Where the student comes from, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.models.hf_adapter import (
    base_model,
    enable_activation_checkpointing,
    name_or_path,
)
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.lora import LoRA, add_adapters
from kd_lightning.models.model_checks import check_causal, check_finite, freeze_unreached
from kd_lightning.models.pretrained import checked_kwargs
from kd_lightning.models.quantized.layers import check_trainable, is_quantized, plain_parameters


@dataclass(frozen=True)
class StudentSource:
    """Where the student comes from.

    Args:
        model: folder, hub name or `asset:` name, or a loaded model.
        init: `pretrained` or `random`.
        kwargs: arguments of `from_pretrained`.
        lora: adapters to add; None: all parameters are trained.
        gradient_checkpointing: whether activations are recomputed in backward.

    Raises:
        ValueError: an argument in `kwargs` is refused.
    """

    model: Any
    init: str = "pretrained"
    kwargs: dict[str, Any] | None = None
    lora: LoRA | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        checked_kwargs(self.kwargs, "student")

    @property
    def name(self) -> str | None:
        """Folder or hub name; None for a loaded model without one."""
        return self.model if isinstance(self.model, str) else name_or_path(self.model)

    def load(self) -> tuple[nn.Module, str | None]:
        """Load the student.

        Returns:
            The model in train mode, without a gradient for what text does not reach; and the digest of its base weights
            if a checkpoint can leave them out: with adapters on weights that can be loaded again. None otherwise.
        """
        student, base_digest = self.model, None
        if isinstance(student, str):
            student = load_causal_lm(student, init=self.init, kwargs=self.kwargs, role="student")
        else:
            if is_quantized(student):
                raise ValueError(
                    "student: a quantized model must be passed as a folder or name, with quantization_config in "
                    "student_kwargs: checkpoints hold its adapters alone"
                )
            check_finite(student, "student")
            check_causal(student.eval(), "student")
        check_trainable(student, "student", self.lora is not None)
        if self.lora is not None:
            if isinstance(self.model, str) and self.init == "pretrained":
                base_digest = tensor_digest(plain_parameters(student))
            student = add_adapters(student, self.lora)
        if frozen := freeze_unreached(student):
            rank_zero_info(f"student: {frozen}")
        if self.gradient_checkpointing:
            enable_activation_checkpointing(base_model(student), "gradient_checkpointing")
        return student.train(), base_digest
