"""The check of `preflight` on padding: how much of the training batches it is, and whether packing would save it."""

from __future__ import annotations

from collections.abc import Sequence

from kd_lightning.cli.prepared_run import Findings, PreparedFit
from kd_lightning.data.rows.loaders import BatchLoaders
from kd_lightning.models.hf_adapter import attends_without_mask
from kd_lightning.models.packing.check import check_packing
from kd_lightning.models.packing.layout import place_rows
from kd_lightning.teachers.batches import models_of_run

BATCHES = 200  # of the first pass, that are measured
MANY = 0.1  # share of the tokens from which packing is recommended


def check_padding(fit: PreparedFit) -> Findings:
    """The models can read packed rows if they have to; packing is recommended where it saves many tokens."""
    data = fit.datamodule
    body = fit.model.body
    if data.packing:
        check_packing(fit.student, body, "student")
        for one in models_of_run(fit.student, fit.module.teacher):
            if one.model is not fit.student:
                check_packing(one.model, None, "teacher")
        return
    if not isinstance(data, BatchLoaders) or fit.generates_responses:
        return
    saved = saved_by_packing(data, fit, attends_without_mask(fit.student))
    if saved < MANY:
        return
    try:
        check_packing(fit.student, body, "student")
    except ValueError:
        return  # a model without this choice
    yield "note", f"{saved:.0%} of the tokens that the student reads are padding: set data.packing to leave them out"


def saved_by_packing(data: BatchLoaders, fit: PreparedFit, one_sequence: bool) -> float:
    """Share of the positions in the first training batches that packing leaves out.

    Args:
        data: with its rows loaded.
        fit: the run.
        one_sequence: whether packed rows are in one sequence.
    """
    lengths = data.row_lengths("train")
    batches = data.training_order(fit.trainer).batches(0)[:BATCHES]
    counts = [positions([lengths[row] for row in rows], one_sequence) for rows in batches]
    padded, packed = (sum(count[side] for count in counts) for side in (0, 1))
    return 1 - packed / padded if padded else 0.0  # no rows before responses are generated


def positions(lengths: Sequence[int], one_sequence: bool = False) -> tuple[int, int]:
    """Positions that a model reads of rows, with padding and packed.

    Args:
        lengths: tokens of each row.
        one_sequence: whether packed rows are in one sequence.
    """
    width = max(lengths)
    packed = sum(lengths) if one_sequence else width * len(place_rows(lengths, width)[1])
    return width * len(lengths), packed
