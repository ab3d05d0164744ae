r"""The loss of every token of a block, from the products of both models, and its gradient in their place.

A block is some rows of two tiles: the student's products \(a = h W^\top + b\) and the teacher's. A head turns them into
logits \(x = \mathrm{cap}(\mathrm{scale} \cdot a)\). The objective reads \(\log q = \log\mathrm{softmax}(x / T)\) and
\(\log p\); any differentiable function of them gives \(u = \partial \ell / \partial \log q\), and

.. math:: \frac{\partial \ell}{\partial x} = \frac1T \Big(u - q \sum_v u_v\Big) .

The label's term is a function of one number a row, \(\log q_y\), with derivative g: its part is \(g\,(e_y - q) / T\).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kd_lightning.divergences import Divergence, check_one_per_token, evaluate
from kd_lightning.engine.compile import BREAK_EVEN, Compiled
from kd_lightning.functional import FLOOR
from kd_lightning.label_losses import LabelLoss
from kd_lightning.schedules import Weight, value

# Entries of one block on a CPU, so that its temporaries stay in the cache. Compiled, a block has at least 32 rows: with
# fewer, inductor parallelises inside a row, and its threads fork and join once per row and pass. A small vocabulary is
# little work between two meetings of the threads: V 4099 takes 9.5 ns per entry in blocks of 32 rows, 7.2 of 64, 5.4 of
# 128 (JSD 12.7, 9.9, 8.1), but there the temporaries of a block begin to show beside two tiles of 512 rows.
EAGER_ENTRIES = 200_000
COMPILED_ROWS, MOST_ROWS, COMPILED_ENTRIES = 32, 64, 270_000
GPU_ENTRIES = 64_000_000

Transform = tuple[float, float | None]  # a head's scale and soft-cap


class TokenLoss(nn.Module):
    r"""\(\ell = (1 - c)\,T^2 D(p, q) + c\,L(\log q_y)\) of each row, and its gradient.

    Args:
        objective: D, any `Divergence`.
        label_loss: L, read at its own temperature.
        ce_weight: c, in [0, 1].
        temperature: T > 0.
        square_temperature: whether the factor T² is there.
        monitors: divergences evaluated beside the loss, at temperature 1, without gradient.
        diagnostics: whether to give "student_nll", "teacher_nll" and "agreement" too, at temperature 1.
        compile: True or False to force; None: by the size of the first call that takes a gradient.
    """

    compile_chosen: Tensor

    def __init__(
        self,
        objective: Divergence,
        label_loss: LabelLoss,
        ce_weight: Weight,
        temperature: float,
        square_temperature: bool,
        monitors: Mapping[str, Divergence],
        diagnostics: bool,
        compile: bool | None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.label_loss = label_loss
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.factor = temperature**2 if square_temperature else 1.0
        self.monitors = nn.ModuleDict(monitors)
        self.diagnostics = diagnostics
        self.compiled = Compiled(self.block, compile)
        # 1, 0, or −1 where nothing is chosen yet: a resumed run goes on with what the interrupted one had chosen.
        with torch.inference_mode(False):  # the first call may be an evaluation, a later one writes here
            self.register_buffer("compile_chosen", torch.tensor(-1, dtype=torch.int8))

    def names(self, teacher: bool) -> tuple[str, ...]:
        """Names of the values, with or without a teacher."""
        names: tuple[str, ...] = ("loss", "kd", "ce", *self.monitors) if teacher else ("loss", "ce")
        if self.diagnostics:
            names += ("student_nll", "teacher_nll", "agreement") if teacher else ("student_nll",)
        return names

    def height(self, rows: int, vocabulary: int, device: torch.device, gradient: bool) -> tuple[int, bool]:
        """Rows of one block in a call on so many rows, and whether every block must be that high (it is compiled)."""
        if gradient and self.compiled.chosen is None:  # evaluation alone never starts a compiler
            before = int(self.compile_chosen)
            self.compiled.chosen = rows * vocabulary >= BREAK_EVEN if before < 0 else before == 1
            self.compile_chosen.fill_(self.compiled.chosen)
        compiled = bool(self.compiled.chosen)
        if device.type != "cpu":
            height = max(1, GPU_ENTRIES // vocabulary)
            if compiled:  # powers of two: a handful of graphs, whatever the number of rows
                height = _round_up(min(1 << (rows - 1).bit_length(), height), COMPILED_ROWS)
            return height, compiled
        if compiled:
            height = max(vocabulary // 2400, min(COMPILED_ENTRIES // vocabulary, MOST_ROWS), 1)
            return _round_up(height, COMPILED_ROWS), True
        return max(8, EAGER_ENTRIES // vocabulary), False

    def forward(
        self,
        z: Tensor,
        y: Tensor | None,
        transforms: tuple[Transform, Transform],
        vectors: Mapping[str, Tensor],
        height: int,
        gradient: bool,
        values: Mapping[str, Tensor],
    ) -> None:
        """Write the values of n rows; z becomes the gradient of their weighted sum with respect to z.

        Args:
            z: the student's products, [m, V] with m ≥ n; a multiple of `height` where compiled.
            y: the teacher's products, like z; None where there is no teacher.
            transforms: scale and soft-cap of the student's head, and of the teacher's.
            vectors: "labels" [n], inside the vocabulary, "weights" [n], and the columns that objectives read.
            height: rows of one block.
            gradient: whether a gradient is wanted; z is left alone where it is not.
            values: written: [n] for each of `names`.
        """
        labels = vectors["labels"].unsqueeze(1)
        n = len(labels)
        rows = {name: column for name, column in vectors.items() if name != "labels"}
        # The label's entry is taken out before and its gradient put in after: a block need not gather or scatter.
        rows["student_label"] = z[:n].gather(1, labels).squeeze(1)
        if y is not None:
            rows["teacher_label"] = y[:n].gather(1, labels).squeeze(1)
        out = dict(values, label_gradient=torch.empty_like(rows["student_label"]))
        for a in range(0, n, height):
            b = a + height if self.compiled.chosen else min(a + height, n)
            block = {name: pad(column[a:b], (0, b - a - len(column[a:b]))) for name, column in rows.items()}
            results = self.compiled(z[a:b], None if y is None else y[a:b], transforms, block, gradient)
            for name, result in results.items():  # kept in one place: small tensors among large ones tear the heap
                out[name][a:b] = result[: n - a]
        if gradient:
            z[:n].scatter_add_(1, labels, out["label_gradient"].unsqueeze(1))

    def block(
        self,
        z: Tensor,
        y: Tensor | None,
        transforms: tuple[Transform, Transform],
        rows: dict[str, Tensor],
        gradient: bool,
    ) -> dict[str, Tensor]:
        """One block, pure but for its last line, which writes z. Compiled as a whole."""
        columns = dict(rows)
        weights = columns.pop("weights")
        student = _Model(z, columns.pop("student_label"), transforms[0])
        teacher = None if y is None else _Model(y, columns.pop("teacher_label"), transforms[1])
        ce_weight = value(self.ce_weight, columns)
        t, label_t = self.temperature, self.label_loss.temperature or self.temperature

        values: dict[str, Tensor] = {}
        values["ce"], g = _differentiate(
            lambda log_q: check_one_per_token(
                self.label_loss, self.label_loss(log_q.clamp_min(FLOOR), columns), log_q.shape
            ),
            student.label_log_prob(label_t),
            weights * ce_weight if gradient else None,
        )
        u = None
        if teacher is None:
            values["loss"] = values["ce"]
        else:
            log_p = teacher.log_probs(t)
            values["kd"], u = _differentiate(
                lambda log_q: self.factor * evaluate(self.objective, log_p, log_q, columns),
                student.log_probs(t),
                weights * (1 - ce_weight) if gradient and not _equals(ce_weight, 1) else None,
            )
            values["loss"] = _mix(values["kd"], values["ce"], ce_weight)
            log_p, log_q = (log_p, student.log_probs(t)) if t == 1 else (teacher.log_probs(1.0), student.log_probs(1.0))
            for name, monitor in self.monitors.items():
                values[name] = evaluate(monitor, log_p, log_q, columns)  # type: ignore[arg-type]
        if self.diagnostics:
            values["student_nll"] = -student.label_log_prob(1.0).clamp_min(FLOOR)
            if teacher is not None:
                values["teacher_nll"] = -teacher.label_log_prob(1.0).clamp_min(FLOOR)
                values["agreement"] = (student.top_token() == teacher.top_token()).to(z.dtype)
        if g is not None:
            slope_z, slope_label = student.slopes()
            values["label_gradient"] = g / label_t * slope_label
            z.copy_(student.gradient(u, t, g, label_t) * slope_z)
        return values


class _Model:
    """One model's rows of a block: from products to log-probabilities at any temperature, and back."""

    def __init__(self, products: Tensor, label_products: Tensor, transform: Transform) -> None:
        self.scale, self.cap = transform
        self.logits, self.label_logits = self._logits(products), self._logits(label_products)
        self.top = self.logits.amax(-1, keepdim=True)
        self.above = self.logits - self.top  # at most 0: what follows loses nothing to large logits
        self.label_above = self.label_logits - self.top.squeeze(-1)
        self._log_sums: dict[float, Tensor] = {}
        self._log_probs: dict[float, Tensor] = {}

    def _logits(self, products: Tensor) -> Tensor:
        x = products if self.scale == 1 else products * self.scale
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap

    def _log_sum(self, t: float) -> Tensor:
        if t not in self._log_sums:
            self._log_sums[t] = _sum(torch.exp(_over(self.above, t))).log()
        return self._log_sums[t]

    def log_probs(self, t: float) -> Tensor:
        """Log softmax(x / t), [..., V], clamped."""
        if t not in self._log_probs:
            self._log_probs[t] = (_over(self.above, t) - self._log_sum(t)).clamp_min(FLOOR)
        return self._log_probs[t]

    def label_log_prob(self, t: float) -> Tensor:
        """The label's entry of it, [...], not yet clamped."""
        return _over(self.label_above, t) - self._log_sum(t).squeeze(-1)

    def top_token(self) -> Tensor:
        """The most probable token, [...]."""
        return self.above.argmax(-1)

    def slopes(self) -> tuple[Tensor | float, Tensor | float]:
        """Derivatives of the logits, and of the label's, with respect to the products."""
        return self._slope(self.logits), self._slope(self.label_logits)

    def _slope(self, x: Tensor) -> Tensor | float:
        return self.scale if self.cap is None else self.scale * (1 - (x / self.cap) ** 2)

    def gradient(self, u: Tensor | None, t: float, g: Tensor, label_t: float) -> Tensor:
        """Gradient with respect to the logits, without the label's own entry g / label_t.

        Args:
            u: gradient with respect to the log-probabilities at t; None where there is none.
            t: temperature of the objective.
            g: gradient with respect to the label's log-probability at label_t, [...].
            label_t: temperature of the label loss.
        """
        g = g.unsqueeze(-1) / label_t
        if u is None:
            return -g * self.log_probs(label_t).exp()
        q = self.log_probs(t).exp()
        total = _sum(u) / _sum(q) / t  # q sums to one only to rounding, and u - q Σu must sum to zero
        if label_t == t:
            return _over(u, t) - q * (total + g)
        return _over(u, t) - q * total - g * self.log_probs(label_t).exp()


def _differentiate(
    function: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Value of a function of rows, and the gradient of its weighted sum (None: not wanted)."""
    if weights is None:
        return function(x), None
    if torch.compiler.is_compiling():
        values, pull = torch.func.vjp(function, x)[:2]
        return values, pull(weights)[0]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = function(x)
    if not values.requires_grad:  # a constant in x
        return values, torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(values, x, weights, allow_unused=True, materialize_grads=True)
    return values.detach(), gradient


def _sum(x: Tensor) -> Tensor:
    """Sum over the vocabulary, kept as a dimension; inductor adds fp32 one by one, which loses two digits."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(-1, keepdim=True)


def _over(x: Tensor, t: float) -> Tensor:
    return x if t == 1 else x / t


def _equals(weight: float | Tensor, number: float) -> bool:
    return not isinstance(weight, Tensor) and weight == number


def _mix(kd: Tensor, ce: Tensor, ce_weight: float | Tensor) -> Tensor:
    """(1 − c)·KD + c·CE; a term of weight 0 is left out, whatever its value."""
    if _equals(ce_weight, 0):
        return kd
    return ce if _equals(ce_weight, 1) else (1 - ce_weight) * kd + ce_weight * ce


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
