"""Figures and tables: as matplotlib objects for TensorBoard and notebooks, as Markdown for reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(
    lines: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Values against steps on one axis, with constant levels as dashed lines.

    Args:
        lines: (step, value) by name.
        title: what the values are.
        levels: baselines by name.
    """
    figure = _figure()
    axes = figure.add_subplot()
    for name, line in lines.items():
        if line:
            axes.plot(*zip(*line, strict=True), label=name)
    for i, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle="--", color=f"{0.2 + 0.25 * i % 0.8:.2f}", linewidth=1, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_title(title)
    axes.legend(fontsize="small")
    return figure


def by_place(shares: Sequence[float]) -> Figure:
    """Share of tokens where both models put the same one first, by place in the response.

    Args:
        shares: in [0, 1], of the first token, the second, …
    """
    figure = _figure()
    axes = figure.add_subplot()
    axes.bar(range(len(shares)), shares)
    axes.set_ylim(0, 1)
    axes.set_xlabel("token of the response")
    axes.set_ylabel("share that agrees")
    return figure


def head_and_tail(kl: Sequence[float], head: Sequence[float]) -> Figure:
    """Forward KL by place in the response, and how much of it lies on the teacher's likeliest tokens.

    Args:
        kl: nats a token, of the first token, the second, …
        head: the part of it on the teacher's head.
    """
    figure = _figure()
    axes = figure.add_subplot()
    axes.bar(range(len(head)), head, label="head: half of the teacher's mass")
    axes.bar(range(len(head)), [all_ - part for all_, part in zip(kl, head, strict=True)], bottom=head, label="tail")
    axes.set_xlabel("token of the response")
    axes.set_ylabel("forward KL (nats a token)")
    axes.legend(fontsize="small")
    return figure


def label_probabilities(counts: Tensor) -> Figure:
    """Tokens by the probability that teacher and student give the label; above the line the student gives more.

    Args:
        counts: [B, B] tokens in each pair of bins of [0, 1], teacher first.
    """
    figure = _figure(4.4, 4.0)
    axes = figure.add_subplot()
    image = axes.imshow(counts.log1p().T.numpy(), origin="lower", extent=(0, 1, 0, 1), aspect="equal")
    axes.plot([0, 1], [0, 1], linestyle="--", color="white", linewidth=1)
    axes.set_xlabel("teacher's probability of the label")
    axes.set_ylabel("student's")
    figure.colorbar(image, label="log(1 + tokens)")
    return figure


def _figure(width: float = 6.0, height: float = 3.6) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure and choose a window system

    return Figure(figsize=(width, height), layout="constrained")


def as_markdown(figure: Figure, text: str) -> str:
    """The figure inside a Markdown page, as a PNG in the text, so that one file can be sent around."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return f"![{text}](data:image/png;base64,{base64.b64encode(out.getvalue()).decode()})"


def markdown_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    plain = ([text.replace("\n", " ").replace("|", "\\|") for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in plain)
