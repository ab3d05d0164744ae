"""Figures of matplotlib, for TensorBoard, notebooks and reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kd_lightning.console import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Values over steps, with baselines as dashed horizontal lines.

    Args:
        lines: (step, value) pairs by name.
        title: title of the figure.
        levels: value of each baseline by name.
    """
    figure = _figure()
    axes = figure.add_subplot()
    for name, line in lines.items():
        if line:
            axes.plot(*zip(*line, strict=True), label=_label(name))
    for i, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle="--", color=f"{0.2 + 0.25 * i % 0.8:.2f}", linewidth=1, label=_label(name))
    axes.set_xlabel("optimizer step")
    axes.set_title(title)
    axes.legend(fontsize="small")
    return figure


def agreement_by_position(shares: Sequence[float]) -> Figure:
    """Share of tokens on which both models have the same most likely token, by position in the response.

    Args:
        shares: in [0, 1], one per position.
    """
    figure = _figure()
    axes = figure.add_subplot()
    axes.bar(range(len(shares)), shares)
    axes.set_ylim(0, 1)
    axes.set_xlabel("position in the response")
    axes.set_ylabel("agreement")
    return figure


def top_and_tail(kl: Sequence[float], top: Sequence[float]) -> Figure:
    """Forward KL by position in the response, split at the top half of the teacher's probability mass.

    Args:
        kl: forward KL in nats per token, one per position.
        top: the part of it on the top of the teacher's distribution.
    """
    figure = _figure()
    axes = figure.add_subplot()
    axes.bar(range(len(top)), top, label="top half of the teacher's mass")
    axes.bar(range(len(top)), [all_ - part for all_, part in zip(kl, top, strict=True)], bottom=top, label="tail")
    axes.set_xlabel("position in the response")
    axes.set_ylabel("forward KL (nats per token)")
    axes.legend(fontsize="small")
    return figure


def label_probabilities(counts: Tensor) -> Figure:
    """Tokens by the probability that teacher and student give the label; above the diagonal the student's is higher.

    Args:
        counts: number of tokens in each pair of bins of [0, 1], teacher first, [bins, bins].
    """
    figure = _figure(4.4, 4.0)
    axes = figure.add_subplot()
    image = axes.imshow(counts.log1p().T.numpy(), origin="lower", extent=(0, 1, 0, 1), aspect="equal")
    axes.plot([0, 1], [0, 1], linestyle="--", color="white", linewidth=1)
    axes.set_xlabel("teacher's probability of the label")
    axes.set_ylabel("student's probability of the label")
    figure.colorbar(image, label="log(1 + tokens)")
    return figure


def _figure(width: float = 6.0, height: float = 3.6) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: it keeps every figure and selects a GUI backend

    return Figure(figsize=(width, height), layout="constrained")


def as_markdown(figure: Figure, text: str) -> str:
    """The figure as Markdown, with its PNG embedded in the text.

    Args:
        figure: the figure.
        text: alternative text of the image.
    """
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return f"![{text}](data:image/png;base64,{base64.b64encode(out.getvalue()).decode()})"


def _label(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar sign would start a formula, an underscore hides a label."""
    text = printable(" ".join(name.split())).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
