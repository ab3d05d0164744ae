r"""Divergences and mixtures as functions of log-probabilities: [..., V] -> [...] (mixtures: -> [..., V]).

The teacher comes first. `log_p` and `log_q` are normalized over the last dimension and clamped at −1e4 by
`log_softmax`: a padding column (logit −inf) has probability exactly 0 and an equal log-probability in both models, so
that no function needs a special case for it. No function branches on data: all of them run under
`torch.compile(fullgraph=True)` and `torch.func`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = -1e4


def log_softmax(logits: Tensor) -> Tensor:
    r"""\(\log\mathrm{softmax}\) in fp32 at least (float64 stays), clamped at −1e4.

    Args:
        logits: [..., V]; −inf for padding columns.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1).clamp_min(FLOOR)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""\(\mathrm{KL}(p \| q) = \sum p\,(\log p - \log q)\), in nats.

    Examples:
        >>> import torch
        >>> from kd_lightning.functional import forward_kl, log_softmax
        >>> forward_kl(log_softmax(torch.zeros(2)), log_softmax(torch.tensor([0.25, 0.75]).log()))
        tensor(0.1438)
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""\(\mathrm{KL}(q \| p) = \sum q\,(\log q - \log p)\), in nats."""
    return forward_kl(log_q, log_p)


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
    r"""\(\beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m)\), \(m = \beta p + (1-\beta) q\) (GKD)."""
    log_m = arithmetic_mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""\(\frac12 \sum |p - q|\), in [0, 1]; the gradient is 0 where p = q."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def head_mask(log_p: Tensor, mu: float, rule: str = "covering") -> Tensor:
    r"""Mask of the teacher's most probable tokens with total mass μ; a bisection on log p, without a sort.

    "covering": the smallest set of top tokens with mass ≥ μ. "official": the token that crosses μ is left out, unless
    it is the first. Tokens of equal probability are in the mask together or not at all.

    The threshold token has at least the mean probability of the remaining tokens, (1 − μ) / V: with that as the lower
    end, 30 halvings reach the resolution of fp32.

    Args:
        log_p: [..., V].
        mu: in (0, 1].
        rule: "covering" or "official".

    Returns:
        [..., V], True for the top tokens.

    Examples:
        >>> import torch
        >>> from kd_lightning.functional import head_mask
        >>> head_mask(torch.tensor([0.6, 0.3, 0.1]).log(), mu=0.8)
        tensor([ True,  True, False])
    """
    p = log_p.exp()
    top = log_p.amax(-1, keepdim=True)
    rest = math.log(max((1 - mu) / log_p.shape[-1], 1e-38)) - 1.0
    low = torch.full_like(top, rest) if mu < 1 else torch.full_like(top, FLOOR + 1)
    low, high = torch.minimum(low, top), top + 1e-3
    for _ in range(30):
        middle = 0.5 * (low + high)
        mass = torch.where(log_p >= middle, p, 0.0).sum(-1, keepdim=True)
        enough = mass >= mu if rule == "covering" else mass > mu
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return log_p >= low if rule == "covering" else (log_p >= high) | (log_p >= top)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mu: float, rule: str = "covering") -> Tensor:
    r"""\(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\), w the top tokens' share of \(\sum|p-q|\), detached."""
    if mu == 1:  # all tokens are top tokens: the weight is exactly 1, without rounding
        return forward_kl(log_p, log_q)
    a, b = log_p.detach(), log_q.detach()  # in an objective either may be the student or a mixture
    gap = (a.exp() - b.exp()).abs()
    total = gap.sum(-1)
    in_head = torch.where(head_mask(a, mu, rule), gap, 0.0).sum(-1)
    weight = torch.where(total > 0, in_head / torch.where(total > 0, total, 1.0), 0.5)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def todi(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""\(\sum w\,p\,(\log p - \log q) + (1-w)\,q\,(\log q - \log p)\), \(w = \sigma(\log p - \log q)\), detached."""
    x = log_p - log_q
    weight = x.detach().sigmoid()
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * x).sum(-1)


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    r"""The α-β-divergence of Cichocki et al., with every limit by continuity.

    \(D = -\frac{1}{\alpha\beta}\sum\bigl[p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta}p^{\alpha+\beta}
    - \frac{\beta}{\alpha+\beta}q^{\alpha+\beta}\bigr]\).

    With \(x = \log p - \log q\), \(s = \alpha + \beta\), \(\varphi_c(x) = (e^{cx} - 1)/c\), \(\varphi_0(x) = x\):
    \(D = \sum q^s(\varphi_s(x) - \varphi_\alpha(x))/\beta\), and \(D^{(\alpha,\beta)}(p,q) = D^{(\beta,\alpha)}(q,p)\):
    dividing by the larger exponent leaves one special case, (0, 0), which is \(\frac12\sum x^2\).
    """
    if abs(beta) < abs(alpha):
        return alpha_beta(log_q, log_p, beta, alpha)
    total = alpha + beta
    x = log_p - log_q
    if total <= 0:  # q^s does not vanish in a padding column, where a mixture is not exactly at the floor
        dead = torch.maximum(log_p, log_q) < FLOOR / 2
        x, log_q = x.masked_fill(dead, 0.0), log_q.masked_fill(dead, 0.0)
    if beta == 0:
        return 0.5 * (x * x).sum(-1)
    u = total * log_q
    return ((_weighted_phi(u, x, total) - _weighted_phi(u, x, alpha)) / beta).sum(-1)


def _weighted_phi(u: Tensor, x: Tensor, c: float) -> Tensor:
    """e^u·φ_c(x), never 0·inf: with g = cx, (e^{u+g} − e^u)/c = ±e^{u+max(g,0)}·expm1(−|g|)/c."""
    if c == 0:
        return u.exp() * x
    g = c * x
    positive = torch.relu(g)  # its gradient at 0 must be 0; that of clamp would be 1
    product = (u + positive).exp() * torch.expm1(g - 2 * positive)
    return torch.where(g > 0, -product, product) / c


def arithmetic_mixture(log_p: Tensor, log_q: Tensor, teacher_weight: float | Tensor) -> Tensor:
    r"""\(\log(\lambda p + (1-\lambda) q)\), [..., V].

    Args:
        log_p: [..., V].
        log_q: [..., V].
        teacher_weight: λ, a number, 0-d, or one per token [...].
    """
    log_w, log_v = _logs(teacher_weight)
    return torch.logaddexp(log_p + log_w, log_q + log_v)


def geometric_mixture(log_p: Tensor, log_q: Tensor, teacher_weight: float | Tensor) -> Tensor:
    r"""\(\log(p^\lambda q^{1-\lambda}/Z)\), [..., V]; shapes as in `arithmetic_mixture`."""
    w = _per_token(teacher_weight)
    h = log_q + w * (log_p - log_q)  # exact where both models agree
    return torch.log_softmax(h, -1)


def alpha_mixture(log_p: Tensor, log_q: Tensor, alpha: float, teacher_weight: float | Tensor) -> Tensor:
    r"""AMiD's assistant \(r \propto (\lambda p^k + (1-\lambda) q^k)^{1/k}\), \(k = (1-\alpha)/2\), [..., V].

    Reduces to the arithmetic mixture at α = −1, the geometric at α = 1 (the limit), the harmonic at α = 3.

    Computed as logaddexp(k log p + log λ, k log q + log(1 − λ))/k, then normalized. For |k| < 1/2 and |g| < 1 with
    \(g = k(\log p - \log q)\), where 1/k would amplify rounding, as \(\log q + \log(1 + \lambda(e^g - 1))/k\). Both
    hold for any λ in [0, 1], including the ends, which a schedule may reach.
    """
    k = (1 - alpha) / 2
    if k == 1:
        return arithmetic_mixture(log_p, log_q, teacher_weight)
    if k == 0:
        return geometric_mixture(log_p, log_q, teacher_weight)
    w = _per_token(teacher_weight)
    log_w, log_v = _logs(teacher_weight)
    h = torch.logaddexp(k * log_p + log_w, k * log_q + log_v) / k
    if abs(k) < 0.5:
        g = k * (log_p - log_q)
        near = g.abs() < 1
        h = torch.where(near, log_q + torch.log1p(w * torch.expm1(torch.where(near, g, 0.0))) / k, h)
    return torch.log_softmax(h, -1)


def entropy(log_q: Tensor) -> Tensor:
    r"""\(-\sum q \log q\), in nats: 0 if and only if one token has probability 1, at most \(\log V\).

    Examples:
        >>> import torch
        >>> from kd_lightning.functional import entropy
        >>> entropy(torch.tensor([0.5, 0.5]).log())  # log 2
        tensor(0.6931)
    """
    return -(log_q.exp() * log_q).sum(-1)


def nll(log_q: Tensor, labels: Tensor) -> Tensor:
    r"""\(-\log q(y)\), in nats.

    Args:
        log_q: log-probabilities of either model, [..., V].
        labels: y, integers in [0, V), [...].
    """
    return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def agreement(log_p: Tensor, log_q: Tensor, top_k: int = 1) -> Tensor:
    r"""Share of the teacher's k most probable tokens that are among the student's, in [0, 1].

    Reduces to \(\arg\max p = \arg\max q\) at k = 1. Ties are broken as in `torch.topk`.

    Args:
        log_p: [..., V].
        log_q: [..., V].
        top_k: in [1, V].
    """
    if top_k == 1:
        return (log_p.argmax(-1) == log_q.argmax(-1)).float()
    theirs, ours = log_p.topk(top_k, dim=-1).indices, log_q.topk(top_k, dim=-1).indices
    return (theirs.unsqueeze(-1) == ours.unsqueeze(-2)).sum((-1, -2)) / top_k


def beats_teacher(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    r"""1 if the student gives the label more probability than the teacher, \(q(y) > p(y)\); ½ if equal; else 0."""
    return (1 + (nll(log_p, labels) - nll(log_q, labels)).sign()) / 2


def calibration_sums(log_q: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    r"""Token count, summed confidence and correct tokens in bins of equal width of the confidence \(\max_v q(v)\).

    These sums can be added over batches, unlike values of `calibration_error`.

    Args:
        log_q: log-probabilities of either model, [..., V].
        labels: y, integers in [0, V), [...].
        bins: at least 1.

    Returns:
        [3, bins], float64.
    """
    top, predicted = log_q.max(-1)
    confidence = top.exp().reshape(-1)
    bin_index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    values = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).reshape(-1).to(top.dtype)])
    return torch.zeros(3, bins, dtype=torch.float64, device=log_q.device).index_add(1, bin_index, values.double())


def calibration_error(log_q: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    r"""Expected calibration error of all tokens, \(\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|\), 0-d.

    In [0, 1]; NaN without tokens. Arguments as in `calibration_sums`.
    """
    count, confidence, correct = calibration_sums(log_q, labels, bins)
    error: Tensor = (correct - confidence).abs().sum() / count.sum()
    return error


def _per_token(weight: float | Tensor) -> float | Tensor:
    """A weight per token with a dimension for the vocabulary; a single weight unchanged."""
    return weight.unsqueeze(-1) if isinstance(weight, Tensor) and weight.ndim else weight


def _logs(weight: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Log λ and log(1 − λ)."""
    if isinstance(weight, Tensor):
        w = _per_token(weight)
        assert isinstance(w, Tensor)
        return w.log(), torch.log1p(-w)
    return (math.log(weight) if weight > 0 else -math.inf), (math.log1p(-weight) if weight < 1 else -math.inf)
