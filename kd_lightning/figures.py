"""Figures as matplotlib objects: for TensorBoard, for reports, for notebooks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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


def _figure(width: float = 6.0, height: float = 3.6) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure and choose a window system

    return Figure(figsize=(width, height), layout="constrained")


def as_markdown(figure: Figure, text: str) -> str:
    """The figure inside a Markdown page, as a PNG in the text, so that one file can be sent around."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return f"![{text}](data:image/png;base64,{base64.b64encode(out.getvalue()).decode()})"
