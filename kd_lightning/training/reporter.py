"""What a run measures next to its loss, and under which names it is logged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from kd_lightning.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL, TotalVariation
from kd_lightning.losses import DistillationLoss, LossParts, check_monitors
from kd_lightning.metrics.per_token import TokenMean
from kd_lightning.schedules import Schedule
from kd_lightning.teachers.base import Teacher
from kd_lightning.training.loss_components import PREFIX, PartialKL, component_loss
from kd_lightning.training.teacher_setup import member_names, tokens_by_member

TRAINING = ("loss", "kd", "ce", "student_share", "grad_norm")  # means that are logged as `train/NAME`


class EvaluationReporter:
    """Monitors, diagnostics and loss components of a run, with the metrics that average them.

    It shares the objective and the schedules with the training loss and has no tensors of its own in a checkpoint.

    Args:
        loss: the training loss.
        teacher: None: there is none. All values are also logged for each teacher that it is made of, as
            `val/NAME/MEMBER`.
        monitors: divergences to measure, by name; None: forward and reverse KL, JSD, total variation, and forward KL
            on the top of the teacher's distribution; without a teacher none.

    Attributes:
        divergences: the divergences measured, by name.
        monitors: the same as a module; it must be a submodule of the Lightning module.
        metrics: token means by `STAGE_NAME`; they must be a submodule of the Lightning module.
        loss: the evaluation loss.
        components: measures the components of the training loss; None without a teacher.

    Raises:
        ValueError: the name of a monitor is not allowed.
    """

    def __init__(
        self, loss: DistillationLoss, teacher: Teacher | None, monitors: Mapping[str, Divergence] | None
    ) -> None:
        has_teacher = teacher is not None
        default = monitors is None and has_teacher
        measured = _default_monitors() if default else check_monitors(monitors)
        self.has_teacher = has_teacher
        self._teacher = teacher if member_names(teacher) else None  # another one may be unloaded by a cache
        self.divergences = measured
        self.monitors = nn.ModuleDict(measured)
        self.metrics = nn.ModuleDict()
        self.loss = DistillationLoss(
            loss.objective,
            ce_weight=loss.ce_weight,
            temperature=loss.token_loss.temperature,
            reduction=loss.reduction,
            monitors={**measured, **({"head_kl": PartialKL("head")} if default else {})},
            diagnostics=True,
        )
        self.components = component_loss(loss.objective) if has_teacher else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that validation logs as `val/NAME`."""
        names = self.loss.token_loss.names(self.has_teacher)
        totals = ["ce" if name == "student_nll" else name for name in names if name not in ("loss", "ce")]
        return (*totals, *(f"{name}/{member}" for name in totals for member in member_names(self._teacher)))

    @staticmethod
    def values(parts: LossParts) -> dict[str, Tensor]:
        """Values of each labeled token by the names they are logged under."""
        values = dict(parts.values)
        values["ce"] = values.pop("student_nll")
        values.pop("loss")
        return values

    def metric(self, stage: str, name: str, device: torch.device) -> tuple[str, TokenMean]:
        """Key and metric of one value in a stage, created on first use."""
        key = f"{stage}_{name}"
        if key not in self.metrics:
            self.metrics[key] = TokenMean().to(device)
        metric = self.metrics[key]
        assert isinstance(metric, TokenMean)
        return key, metric

    def update(
        self, stage: str, values: Mapping[str, Tensor], batch: Mapping[str, Tensor], device: torch.device
    ) -> Iterator[tuple[str, str, TokenMean]]:
        """Add the values of a batch to the metrics of a stage.

        Args:
            stage: `val` or `test`.
            values: of each labeled token, by name, [N].
            batch: the batch.
            device: of the run.

        Yields:
            Name that is logged, path of the metric, and metric.
        """
        members = list(zip(member_names(self._teacher), tokens_by_member(self._teacher, batch), strict=True))
        for name, value in values.items():
            found = {f"{stage}/{name}": (name, value)}
            for number, (member, own) in enumerate(members):
                found[f"{stage}/{name}/{member}"] = (f"{name}/{number}", value[own])  # no dots in names of modules
            for logged, (key_name, chosen) in found.items():
                key, metric = self.metric(stage, key_name, device)
                metric.update(chosen)
                yield logged, f"evaluation.{key}", metric

    def mean(self, stage: str, name: str) -> float | None:
        """The mean of one value in the stage so far; None if it was not measured."""
        key = f"{stage}_{name}"
        return float(self.metrics[key].compute()) if key in self.metrics else None  # type: ignore[operator]

    @staticmethod
    def training_scalars(
        means: Mapping[str, Tensor], schedules: Mapping[str, Schedule], notes: Iterable[str]
    ) -> dict[str, Tensor]:
        """What is logged of one optimizer step, by full name.

        Args:
            means: of the accumulation window.
            schedules: by path; one that gives a number per response is logged as its mean.
            notes: names of further means to log.
        """
        names = (*TRAINING, *sorted(notes))
        scalars = {f"train/{name}": means[name] for name in names if name in means}
        scalars |= {name: means[name] for name in means if name.startswith(PREFIX)}
        scalars |= {f"train/{name}": means[name] for name in means if name.startswith(("token_weight", "tokens_kept"))}
        for path, schedule in schedules.items():
            value = means.get(f"schedule/{path}", schedule())
            if value.ndim == 0:
                scalars[f"schedule/{path}"] = value
        return scalars


def _default_monitors() -> dict[str, Divergence]:
    return {
        "forward_kl": ForwardKL(),
        "reverse_kl": ReverseKL(),
        "jsd": GeneralizedJSD(0.5),
        "total_variation": TotalVariation(),
    }
