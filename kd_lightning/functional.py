r"""Pure mathematics on log-probabilities, [..., V] -> [...].

Teacher p first, student q second. Everything stays in log space, works in the inputs' precision, and can be captured
in one graph: no branch depends on data. Log-probabilities come from `log_softmax`, clamped at `FLOOR`: there exp is
exactly 0 and the difference of two of them is 0, so that a dead column (−inf, padding) weighs nothing and its value and
gradient equal deletion of the column, without a guard.

Weights are Python numbers or tensors, 0-d or one number per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = -1e4
BISECTIONS = 26  # of an interval of log V + log 1/(1 − μ), below 20: to the last bit of fp32


def log_softmax(logits: Tensor) -> Tensor:
    r"""Log-probabilities \(\max(x - \log \sum_v e^{x_v}, -10^4)\), in fp32 at least; float64 stays float64.

    Args:
        logits: [..., V]; −inf where an entry does not exist.

    Returns:
        [..., V].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(dtype), -1).clamp_min(FLOOR)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence \(\sum_v a (\log a - \log b)\) of any two of teacher, student and assistant."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""\(\frac12 \sum_v |p - q|\), in [0, 1]; its gradient is 0 where p = q."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
    r"""\(\beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m)\) with \(m = \beta p + (1-\beta) q\).

    Zero at both ends of β; divided by β it tends to KL(p‖q) at β → 0, divided by 1 − β to KL(q‖p) at β → 1.
    """
    log_m = alpha_mixture(log_p, log_q, -1.0, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mu: float, covering: bool = True) -> Tensor:
    r"""\(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\), w the head's share of \(\sum_v |p - q|\), without gradient.

    The head is the set of the teacher's most probable tokens that holds the mass μ, found without a sort: it is a
    threshold on log p, and a bisection finds it. Tokens of equal probability go together. At p = q the value is 0.

    Args:
        log_p: teacher, [..., V].
        log_q: student, [..., V].
        mu: mass of the head, in (0, 1].
        covering: True: the smallest set with mass ≥ μ. False: the largest with mass ≤ μ, and the top token in any case.
    """
    lp, p = log_p.detach(), log_p.detach().exp()
    gap = (p - log_q.detach().exp()).abs()
    top = lp.amax(-1, keepdim=True)
    # All tokens below (1 − μ)/V together weigh less than 1 − μ: the threshold is not among them.
    low = torch.full_like(top, max(FLOOR, math.log((1 - mu) / lp.shape[-1]) if mu < 1 else FLOOR))
    high = top + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mass = torch.where(lp >= middle, p, 0).sum(-1, keepdim=True)
        inside = mass >= mu if covering else mass > mu
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    head = lp >= (low if covering else torch.minimum(high, top))
    head_gap = torch.where(head, gap, 0).sum(-1)
    w = head_gap / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    r"""\(D^{(\alpha,\beta)}(p, q) = -\frac{1}{\alpha\beta} \sum_v \big[p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta}
    p^{\alpha+\beta} - \frac{\beta}{\alpha+\beta} q^{\alpha+\beta}\big]\), and its limits on the axes and at α + β = 0.

    With x = log p − log q, s = α + β and \(\varphi_c(x) = (e^{cx} - 1)/c\), \(\varphi_0(x) = x\), the sum is

    .. math:: D = \sum_v q^s\, \frac{\varphi_s(x) - \varphi_\alpha(x)}{\beta} ,

    and \(D^{(\alpha,\beta)}(p, q) = D^{(\beta,\alpha)}(q, p)\). Divided by the larger exponent this leaves one special
    case, (0, 0): \(\frac12 \sum_v x^2\). Every term is ≥ 0. Reduces to KL(p‖q) at (1, 0), KL(q‖p) at (0, 1).

    With exponents ≥ 0 nothing overflows; with a negative one the divergence itself may exceed fp32 on peaked rows.
    """  # noqa: D205
    if abs(alpha) > abs(beta):
        return alpha_beta(log_q, log_p, beta, alpha)
    s = alpha + beta
    x = log_p - log_q
    if s <= 0:  # q^s does not vanish in a dead column; a mixture's may lie somewhat off the floor
        dead = torch.maximum(log_p, log_q) < FLOOR / 2
        x, log_q = x.masked_fill(dead, 0), log_q.masked_fill(dead, 0)
    if beta == 0:
        return (x * x).sum(-1) / 2
    u = s * log_q
    return (_exp_gap(u, s, x) - _exp_gap(u, alpha, x)).sum(-1) / beta


def _exp_gap(u: Tensor, c: float, x: Tensor) -> Tensor:
    r"""\(e^u \varphi_c(x) = (e^{u + cx} - e^u)/c\) by one expm1 of a number ≤ 0, accurate at 0, free of overflow."""
    if c == 0:
        return u.exp() * x
    gap = c * x
    # relu, and its derivative 0 at 0, goes with the sign + there: sign, abs and copysign have a wrong gradient at 0.
    above = torch.relu(gap)
    size = torch.exp(u + above) * torch.expm1(gap - 2 * above)
    return torch.where(gap > 0, -size, size) / c


def alpha_mixture(log_p: Tensor, log_q: Tensor, alpha: float, teacher_weight: float | Tensor) -> Tensor:
    r"""Normalised α-mixture \(r \propto (\lambda p^k + (1-\lambda) q^k)^{1/k}\), \(k = (1-\alpha)/2\), in logs.

    Reduces to the arithmetic mean at α = −1, the geometric (k = 0, by continuity) at 1, the harmonic at 3.

    Args:
        log_p: teacher, [..., V].
        log_q: student, [..., V].
        alpha: any finite number.
        teacher_weight: λ, in [0, 1].

    Returns:
        log r, [..., V].
    """
    k = (1 - alpha) / 2
    x = log_p - log_q
    if isinstance(teacher_weight, Tensor):
        w: float | Tensor = teacher_weight.to(x.dtype).unsqueeze(-1)
    else:
        w = teacher_weight
    if k == 0:
        return torch.log_softmax(log_q + w * x, -1)
    log_w, log_rest = _logs(w)
    h = torch.logaddexp(k * log_p + log_w, k * log_q + log_rest) / k
    if abs(k) < 0.5:  # there 1/k enlarges the rounding of logaddexp, where both powers are nearly equal
        near = (k * x).abs() < 1
        ratio = torch.log1p(w * torch.expm1(torch.where(near, k * x, 0)))
        h = torch.where(near, log_q + ratio / k, h)
    return h if k == 1 else torch.log_softmax(h, -1)  # a mean of two distributions is one


def _logs(w: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Logarithms of w and 1 − w, −inf where they are 0."""
    if isinstance(w, Tensor):
        return w.log(), torch.log1p(-w)
    return math.log(w) if w > 0 else -math.inf, math.log1p(-w) if w < 1 else -math.inf
