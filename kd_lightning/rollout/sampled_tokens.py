"""Checks of label losses that are correct only for tokens sampled from the student."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.label_losses import LabelLoss
from kd_lightning.rollout.base import ResponseSource
from kd_lightning.teachers.base import Teacher


def check_sampled_tokens(label_loss: LabelLoss | None, temperature: float, responses: ResponseSource | None) -> None:
    """Check that a label loss for sampled tokens gets tokens that are sampled as it assumes.

    Args:
        label_loss: None: cross entropy.
        temperature: of the loss.
        responses: source of the responses; None: those of the data.

    Raises:
        ValueError: responses are sampled from another distribution than the loss reads, or are trained on again
            without importance weights.
    """
    if label_loss is None or not label_loss.sampled:
        return
    name, source = type(label_loss).__name__, type(responses).__name__
    if responses is not None:
        sampling, wanted = responses.sampling, label_loss.temperature or temperature
        if sampling is not None and sampling.temperature != wanted:
            raise ValueError(
                f"the sampling temperature and the loss's temperature must be equal for {name}, got "
                f"{sampling.temperature:g} in {source} and {wanted:g}"
            )
        if sampling is not None and sampling.top_p != 1:
            raise ValueError(f"top_p must be 1 for {name}, got {sampling.top_p:g} in {source}")
        if responses.served is not None and responses.served.max_staleness > 0:
            raise ValueError(
                f"max_staleness must be 0 for {name}: {source} gives no importance weights for responses of earlier "
                f"weights, got {responses.served.max_staleness}"
            )
        weights = {"importance", "old_log_prob"} & set(responses.columns or ())
        if responses.replays and not weights:
            raise ValueError(
                f"{source} trains on responses again that an earlier student generated, and gives no importance "
                f"weights, which {name} needs: pass responses=OnPolicy(share=1) or MiniLLM"
            )
    if responses is None or responses.uses_data:
        given = "none" if responses is None else source
        rank_zero_warn(
            f"{name} is correct for tokens sampled from the student, and this run also trains on the responses of the "
            f"data (responses: {given}): pass responses=OnPolicy(share=1)"
        )


def check_label_columns(
    label_loss: LabelLoss, teacher: Teacher | None, responses: ResponseSource | None, known_data: bool
) -> None:
    """Check that a label loss for sampled tokens finds what it reads where there is no teacher.

    Args:
        label_loss: the term on the label.
        teacher: None: there is none.
        responses: source of the responses; None: those of the data.
        known_data: whether the data module is one of this package, which adds no such columns.

    Raises:
        ValueError: nothing in the run supplies it.
    """
    if teacher is not None or not known_data or (responses is not None and responses.columns is None):
        return
    given = () if responses is None else responses.columns or ()
    missing = [name for name in label_loss.columns if name not in given]
    if label_loss.sampled and missing:
        raise ValueError(f"{type(label_loss).__name__} reads {' and '.join(missing)} of the teacher: pass teacher=")
