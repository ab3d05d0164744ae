"""What a run measures next to its loss, and under which names it is logged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from kd_lightning.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL, TotalVariation
from kd_lightning.engine.block_logits import SHARED_MASS
from kd_lightning.losses import DistillationLoss, LossParts, check_monitors
from kd_lightning.losses.loss_parts import measured_tokens
from kd_lightning.metrics.drafting import accepted_length
from kd_lightning.metrics.per_token import TokenMean
from kd_lightning.schedules import Schedule
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.batches import member_names, tokens_by_member
from kd_lightning.training.loss_components import PREFIX, PartialKL, component_loss

DRAFTING = ("acceptance", "accepted_length")
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
        components: measures the components of the training loss; None without a teacher, and with two tokenizers.
        two_tokenizers: whether the teacher reads other tokens than the student.

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
        self.two_tokenizers = False
        self.loss = _evaluation_loss(loss, {**measured, **({"head_kl": PartialKL("head")} if default else {})})
        self.components = component_loss(loss.objective) if has_teacher else None

    def use_two_tokenizers(self) -> None:
        """Measure where both models have read the same text, without what depends on the order of the vocabulary.

        The top of a distribution is not defined where tokens of two vocabularies are merged.
        """
        self.two_tokenizers = True
        self.loss = _evaluation_loss(self.loss, self.divergences)
        self.components = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that validation logs as `val/NAME`."""
        names = self.loss.token_loss.names(self.has_teacher)
        totals = ["ce" if name == "student_nll" else name for name in names if name not in ("loss", "ce")]
        totals += [] if self._distance is None else DRAFTING
        totals += ["aligned_share", *SHARED_MASS] if self.two_tokenizers else []
        return (*totals, *(f"{name}/{member}" for name in totals for member in member_names(self._teacher)))

    @property
    def _distance(self) -> str | None:
        """The monitor that is total variation; None: there is none, or the student cannot draft for the teacher."""
        found = (name for name, one in self.divergences.items() if isinstance(one, TotalVariation))
        return next(found, None) if self.has_teacher and not self.two_tokenizers else None

    def values(self, parts: LossParts, labels: Tensor) -> dict[str, Tensor]:
        """Values of each labeled token by the names they are logged under.

        Args:
            parts: of the evaluation loss.
            labels: shifted, [B, T].
        """
        values = dict(parts.values)
        values["ce"] = values.pop("student_nll")
        values.pop("loss")
        if self._distance in values:
            acceptance = 1 - values[self._distance]
            values |= dict(zip(DRAFTING, (acceptance, accepted_length(acceptance, labels)), strict=True))
        return values

    @staticmethod
    def _measured(values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Names that are logged, values, and the tokens over which their means are taken."""
        for name, value in values.items():
            if name != "label_aligned":
                yield "aligned_share" if name == "aligned" else name, value, measured_tokens(values, name)

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
        for name, value, tokens in self._measured(values):
            found = {f"{stage}/{name}": (name, value, tokens)}
            for number, (member, own) in enumerate(members):
                part = None if tokens is None else tokens[own]
                found[f"{stage}/{name}/{member}"] = (f"{name}/{number}", value[own], part)  # no dots in module names
            for logged, (key_name, chosen, weights) in found.items():
                key, metric = self.metric(stage, key_name, device)
                metric.update(chosen, weights)
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
        scalars |= {"train/aligned_share": means["aligned"]} if "aligned" in means else {}
        scalars |= {name: means[name] for name in means if name.startswith(PREFIX)}
        scalars |= {f"train/{name}": means[name] for name in means if name.startswith(("token_weight", "tokens_kept"))}
        for path, schedule in schedules.items():
            value = means.get(f"schedule/{path}", schedule())
            if value.ndim == 0:
                scalars[f"schedule/{path}"] = value
        return scalars


def _evaluation_loss(loss: DistillationLoss, monitors: Mapping[str, Divergence]) -> DistillationLoss:
    """A loss with the same terms, with monitors and diagnostics."""
    return DistillationLoss(
        loss.objective,
        ce_weight=loss.ce_weight,
        temperature=loss.token_loss.temperature,
        reduction=loss.reduction,
        monitors=monitors,
        diagnostics=True,
    )


def _default_monitors() -> dict[str, Divergence]:
    return {
        "forward_kl": ForwardKL(),
        "reverse_kl": ReverseKL(),
        "jsd": GeneralizedJSD(0.5),
        "total_variation": TotalVariation(),
    }
