"""Measured implementations: every loss by name, a straightforward version, and peer libraries where installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kd_lightning as kd

Inputs = dict[str, Tensor]  # "h" [N, Hs], "w" [V, Hs] of the student, "ht", "wt" of the teacher, "labels" [N]


class Hellinger(kd.Divergence):
    """A custom divergence."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Squared Hellinger distance."""
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)


OBJECTIVES: dict[str, Callable[[], kd.Divergence]] = {
    "forward_kl": kd.ForwardKL,
    "reverse_kl": kd.ReverseKL,
    "taid": kd.TAID,
    "jsd": kd.GeneralizedJSD,
    "skew_kl": kd.SkewKL,
    "skew_reverse_kl": kd.SkewReverseKL,
    "alpha": lambda: kd.AlphaDivergence(0.5),
    "alpha_beta": lambda: kd.AlphaBeta(0.2, 0.7),
    "amid": lambda: kd.AMiD(kd.AlphaBeta(0.2, 0.7), alpha=-3.0, teacher_weight=0.1, pair=("teacher", "assistant")),
    "adaptive_kl": kd.AdaptiveKL,
    "symmetric_kl": kd.SymmetricKL,
    "total_variation": kd.TotalVariation,
    "own": Hellinger,
}
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # TRL's parameter for these losses


def inputs(
    shape: tuple[int, ...], labeled: float = 1.0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Inputs:
    """Hidden states and LM heads of two models; a fraction `labeled` of the tokens has a label."""
    torch.manual_seed(0)
    vocabulary, student, teacher, n = shape
    found = {
        "h": torch.randn(n, student),
        "w": torch.randn(vocabulary, student) / student**0.5,
        "ht": torch.randn(n, teacher),
        "wt": torch.randn(vocabulary, teacher) / teacher**0.5,
    }
    found = {name: tensor.to(device, dtype) for name, tensor in found.items()}
    for name in ("h", "w"):
        found[name].requires_grad_()
    labels = torch.randint(0, vocabulary, (n,)).masked_fill(torch.rand(n) >= labeled, -100)
    return {**found, "labels": labels.to(device)}


def padded_tile(rows: int, head: Tensor) -> Tensor:
    """A buffer for logits whose row stride is not a power of two."""
    return head.new_empty(rows, -(-len(head) // 64) * 64 + 16)[:, : len(head)]


def products(x: Inputs, chunk: int, padded: bool) -> Any:
    """The four matmuls on the tokens with a label, without a loss: into new tiles, or into two reused padded tiles."""
    index = (x["labels"] != -100).nonzero().squeeze(1)
    h, ht = (x[name].detach()[index] for name in ("h", "ht"))
    w, wt = x["w"].detach(), x["wt"]
    dh, dw = torch.empty_like(h), None
    tiles = [padded_tile(chunk, w) for _ in range(2)] if padded else []
    for a in range(0, len(h), chunk):
        b = min(a + chunk, len(h))
        if padded:
            z = torch.mm(h[a:b], w.t(), out=tiles[0][: b - a])
            torch.mm(ht[a:b], wt.t(), out=tiles[1][: b - a])
        else:
            z, y = h[a:b] @ w.t(), ht[a:b] @ wt.t()
            assert y.shape == z.shape
        torch.mm(z, w, out=dh[a:b])
        dw = z.t() @ h[a:b] if dw is None else dw.addmm_(z.t(), h[a:b])
    return dh, dw


def naive(x: Inputs, objective: kd.Divergence) -> Tensor:
    """Straightforward version: full logits, log-softmax, autograd, then the mask. One loss per labeled token."""
    log_q = torch.log_softmax((x["h"] @ x["w"].t()).float(), -1)
    log_p = torch.log_softmax((x["ht"] @ x["wt"].t()).float(), -1)
    losses: Tensor = objective(log_p, log_q)
    return losses[x["labels"] != -100]


def trl_kernel() -> Callable[..., Any]:
    """TRL's chunked divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply  # type: ignore[no-any-return]


def trl_gkd() -> Callable[..., Any]:
    """TRL's GKD loss on logits."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss  # type: ignore[no-any-return]


PEERS: dict[str, Callable[[], Callable[..., Any]]] = {"trl_kernel": trl_kernel, "trl_gkd": trl_gkd}


def peer(name: str, loss: str) -> Callable[[Inputs], Tensor]:
    """The losses of a peer library for the tokens with a label.

    Raises:
        ImportError: If the library is not installed.
    """
    function, beta = PEERS[name](), BETA[loss]
    if name == "trl_kernel":

        def run(x: Inputs) -> Tensor:
            losses, _ = function(x["h"], x["w"], None, x["ht"], x["wt"], None, beta)
            return losses[x["labels"] != -100]  # type: ignore[no-any-return]
    else:

        def run(x: Inputs) -> Tensor:
            student, teacher = x["h"] @ x["w"].t(), x["ht"] @ x["wt"].t()
            losses = function(student[None], teacher[None], x["labels"][None], beta=beta, reduction="none")
            return losses.sum(-1)  # type: ignore[no-any-return]

    return run
