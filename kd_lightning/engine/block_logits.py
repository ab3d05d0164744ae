"""The logits of one model's tokens of a block, and the label's log-probabilities that losses read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kd_lightning.divergences import Composite, Divergence
from kd_lightning.engine.head import Transform, apply_transform
from kd_lightning.functional import FLOOR
from kd_lightning.token_weights import OF_TOKEN, TokenWeight


class BlockLogits:
    """One model's tokens of a block: from products to log-probabilities at any temperature, and back to gradients."""

    def __init__(self, products: Tensor, label_products: Tensor, transform: Transform) -> None:
        self.scale, self.cap = transform
        self.logits = apply_transform(products, transform)
        self.label_logits = apply_transform(label_products, transform)
        self.top = self.logits.amax(-1, keepdim=True)
        self.shifted = self.logits - self.top  # at most 0: large logits cost no precision below
        self.label_shifted = self.label_logits - self.top.squeeze(-1)
        self._log_sums: dict[float, Tensor] = {}
        self._log_probs: dict[float, Tensor] = {}

    def _log_sum(self, t: float) -> Tensor:
        if t not in self._log_sums:
            self._log_sums[t] = _sum(torch.exp(_divided(self.shifted, t))).log()
        return self._log_sums[t]

    def log_probs(self, t: float) -> Tensor:
        """Log softmax(x / t), [..., V], clamped at `FLOOR`."""
        if t not in self._log_probs:
            self._log_probs[t] = (_divided(self.shifted, t) - self._log_sum(t)).clamp_min(FLOOR)
        return self._log_probs[t]

    def label_log_prob(self, t: float) -> Tensor:
        """The label's log-probability at t, [...], not clamped."""
        return _divided(self.label_shifted, t) - self._log_sum(t).squeeze(-1)

    def top_token(self) -> Tensor:
        """The most probable token, [...]."""
        return self.shifted.argmax(-1)

    def slopes(self) -> tuple[Tensor | float, Tensor | float]:
        """Derivatives of the logits, and of the label's, with respect to the products."""
        return self._slope(self.logits), self._slope(self.label_logits)

    def _slope(self, x: Tensor) -> Tensor | float:
        return self.scale if self.cap is None else self.scale * (1 - (x / self.cap) ** 2)

    def gradient(self, u: Tensor | None, t: float, g: Tensor, label_t: float) -> Tensor:
        """Gradient with respect to the logits, without the term g / label_t of the label's entry.

        Args:
            u: gradient with respect to the log-probabilities at t; None: no objective.
            t: temperature of the objective.
            g: gradient with respect to the label's log-probability at label_t, [...].
            label_t: temperature of the label loss.
        """
        g = g.unsqueeze(-1) / label_t
        if u is None:
            return -g * self.log_probs(label_t).exp()
        q = self.log_probs(t).exp()
        total = _sum(u) / _sum(q) / t  # q sums to 1 only up to rounding, and u − q Σu must sum to 0
        if label_t == t:
            return _divided(u, t) - q * (total + g)
        return _divided(u, t) - q * total - g * self.log_probs(label_t).exp()


def label_columns_of(parts: Iterable[Divergence]) -> frozenset[str]:
    """Entries of the extra inputs that divergences and token weights read per token."""
    modules = (module for part in parts for module in part.modules())
    return frozenset(name for x in modules if isinstance(x, (Composite, TokenWeight)) for name in x.columns)


def with_label_log_probs(
    columns: dict[str, Tensor], reads: Iterable[str], student: BlockLogits, teacher: BlockLogits, t: float
) -> dict[str, Tensor]:
    """The extra inputs with those log-probabilities of the label, at a temperature, that are read and not given."""
    found = dict(columns)
    for name, model in (("teacher_log_prob", teacher), ("student_log_prob", student)):
        if name in reads and OF_TOKEN + name not in columns:
            found[OF_TOKEN + name] = model.label_log_prob(t).clamp_min(FLOOR)
            found.setdefault(name, found[OF_TOKEN + name])  # a schedule may read the mean under this name
    return found


def _sum(x: Tensor) -> Tensor:
    """Sum over the vocabulary, kept as a dimension; in fp32 inductor adds sequentially, which costs two digits."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(-1, keepdim=True)


def _divided(x: Tensor, t: float) -> Tensor:
    return x if t == 1 else x / t
