"""Loss and gradient of the authors' own code on fixed logits: every record of `golden/manifest.json`.

The reference is the full divergence in float64, written below in terms of probabilities. Where the
authors' code agrees with it (the manifest says where not, and why), its gradient is compared too.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.divergences import (
    AdaptiveKL,
    AlphaBeta,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SymmetricKL,
    TotalVariation,
)
from kd_lightning.losses import distillation_loss, fused_distillation_loss
from kd_lightning.objectives import TAID, AMiD, Contrastive, SkewKL, SkewReverseKL
from kd_lightning.schedules import Linear, ResponseGap, TAIDSchedule
from locations import GOLDEN

RECORDS: dict[str, dict[str, Any]] = {
    record["id"]: record for record in json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["records"]
}
TOLERANCE = 2e-4

# Decisions of DistiLLM's replay buffer, a response source: rollout/test_replay.py.
REPLAY = ("taid.SampleGenerator.update", "taid.SampleGenerator.forward")
SCHEDULES = [name for name in RECORDS if name.startswith("taid.update_t.")]
ELSEWHERE = [name for name in RECORDS if name.startswith("minillm.")]  # test_minillm_golden.py
ALPHANET = [name for name in RECORDS if name.startswith("abkd.alphanet.")]
LOSSES = [name for name in RECORDS if name not in (*REPLAY, *SCHEDULES, *ELSEWHERE, *ALPHANET)]


def test_every_record_is_accounted_for() -> None:
    parts = Counter(losses=len(LOSSES), alphanet=len(ALPHANET), schedules=len(SCHEDULES), minillm=len(ELSEWHERE))
    assert parts == Counter(losses=393, alphanet=2, schedules=4, minillm=5)
    assert sum(parts.values()) + len(REPLAY) == len(RECORDS) == 406
    assert set(REPLAY) <= set(RECORDS)


@functools.cache
def arrays(name: str) -> dict[str, Tensor]:
    """The tensors of one file."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


# ------------------------------------------------------------------------------ the formulas, in probabilities, float64
def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def skew(a: Tensor, b: Tensor, alpha: Any, detach: bool = False) -> Tensor:
    """KL(a ‖ α a + (1 − α) b), α a number or one per response [B]."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1, 1)
    m = alpha * a + (1 - alpha) * b
    return kl(a, m.detach() if detach else m)


def detached(r: dict[str, Any]) -> bool:
    """DistiLLM-2's code detaches the mixture of its reverse skew, also with an adaptive skew."""
    return r["name"] == "skew_rkl_rows" or r.get("detach_mixture", False)


def ab(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    if a == b == 0:
        return ((p / q).log() ** 2).sum(-1) / 2
    if b == 0:
        return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
    if a == 0:
        return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
    if a + b == 0:
        return ((q**a / p**a).log() + (p / q) ** a - 1).sum(-1) / a**2
    return -(p**a * q**b - (a * p ** (a + b) + b * q ** (a + b)) / (a + b)).sum(-1) / (a * b)


def akl(p: Tensor, q: Tensor, mu: float, rule: str = "official") -> Tensor:
    order = p.argsort(-1, descending=True)
    mass = p.gather(-1, order).cumsum(-1)
    gap = (p - q).abs().detach().gather(-1, order)
    head = mass <= mu if rule == "official" else mass - p.gather(-1, order) < mu
    head[..., 0] = True
    w = (gap * head).sum(-1) / gap.sum(-1)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def mixture(p: Tensor, q: Tensor, alpha: float, weight: float) -> Tensor:
    k = (1 - alpha) / 2
    r = p**weight * q ** (1 - weight) if k == 0 else (weight * p**k + (1 - weight) * q**k) ** (1 / k)
    return r / r.sum(-1, keepdim=True)


def reference_loss(p: Tensor, q: Tensor, r: dict[str, Any]) -> Tensor:
    """The divergence of each token that the manifest's `reference` names."""
    match r["name"]:
        case "fkl":
            return kl(p, q)
        case "rkl":
            return kl(q, p)
        case "tvd":
            return (p - q).abs().sum(-1) / 2
        case "symmetric":
            return (1 - r["w_rkl"]) * kl(p, q) + r["w_rkl"] * kl(q, p)
        case "gjsd":
            m = r["beta"] * p + (1 - r["beta"]) * q
            return r["beta"] * kl(p, m) + (1 - r["beta"]) * kl(q, m)
        case "skew_fkl" | "skew_fkl_rows":
            return skew(p, q, r["alpha"])
        case "skew_rkl" | "skew_rkl_rows":
            return skew(q, p, r["alpha"], detached(r))
        case "akl":
            return akl(p, q, r["mu"], r.get("rule", "official"))
        case "abd":
            return ab(p, q, r["alpha"], r["beta"])
        case "taid":
            return kl(mixture(p, q, 1, r["t"]).detach(), q)
        case "amid":
            models = {"p": p, "q": q, "r": mixture(p, q, r["alpha"], r["lam"])}
            a, b = (models[x] for x in r["order"])
            return kl(a, b) if r["div"] == "kl" else ab(a, b, 0.2, 0.7)
        case "cald":
            rows = [(2 - r["beta"]) * skew(p[:1], q[:1], 0.1), r["beta"] * skew(q[1:], p[1:], 0.1, True)]
            return 2 * torch.cat(rows)  # the sum of two means, not the mean over both responses
    raise AssertionError(r["name"])


# --------------------------------------------------------------------------------------------- the same by this package
def objective(record: dict[str, Any], r: dict[str, Any]) -> Divergence:
    """The objective as a user would write it."""
    match r["name"]:
        case "fkl":
            return ForwardKL()
        case "rkl":
            return ReverseKL()
        case "tvd":
            return TotalVariation()
        case "symmetric":
            return SymmetricKL(1 - r["w_rkl"])
        case "gjsd":
            return GeneralizedJSD(r["beta"])
        case "skew_fkl":
            return SkewKL(r["alpha"])
        case "skew_rkl":
            return SkewReverseKL(r["alpha"], detach_assistant=detached(r))
        case "skew_fkl_rows":
            return SkewKL(followed(record["hyper"], "teacher"))
        case "skew_rkl_rows":
            return SkewReverseKL(followed(record["hyper"], "student"), detach_assistant=detached(r))
        case "akl":
            return AdaptiveKL(r["mu"], "covering" if r.get("rule") else "official")
        case "abd":
            return AlphaBeta(r["alpha"], r["beta"])
        case "taid":
            t = Linear(0.0, r["t"])
            t.update(1.0, {})
            return TAID(t)
        case "amid":
            names = {"p": "teacher", "q": "student", "r": "assistant"}
            inner = ForwardKL() if r["div"] == "kl" else AlphaBeta(0.2, 0.7)
            return AMiD(inner, r["alpha"], r["lam"], (names[r["order"][0]], names[r["order"][1]]))
        case "cald":
            return Contrastive(SkewKL(0.1), SkewReverseKL(0.1, detach_assistant=True), 1 - r["beta"] / 2)
    raise AssertionError(r["name"])


def followed(hyper: dict[str, Any], side: str) -> ResponseGap:
    """DistiLLM-2's adaptive skew after a step with the record's mean gap; the loss computes each response's gap."""
    schedule = ResponseGap(hyper["alpha0"], hyper["clip"][0], side)
    schedule.update(0.0, {"gap": torch.tensor(hyper["m"] if side == "teacher" else -hyper["m"])})
    return schedule


def reference(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("reference") or {"name": "cald", "beta": record["hyper"]["beta"]}


def reduce(losses: Tensor, labels: Tensor, reduction: str, vocabulary: int) -> Tensor:
    counted = labels != -100
    if reduction == "seq_mean":
        return torch.stack([row[mask].mean() for row, mask in zip(losses, counted, strict=True)]).mean()
    total = losses[counted]
    return {"token_mean": total.mean(), "sum": total.sum(), "elem_mean": total.mean() / vocabulary}[reduction]


@functools.cache
def orthogonal(n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0].to(dtype)


# The compiled path takes seconds a record; torch itself warns when the compiler is first imported.
COMPILED = (pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"))
PATHS = ["logits", "hidden", pytest.param("compiled", marks=COMPILED)]


def run(path: str, record: dict[str, Any], divergence: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient with respect to the student's logits, by either of the two losses."""
    inputs = arrays(f"inputs_{record['case']}")
    labels, vocabulary = inputs["labels"], inputs["student_logits"].shape[-1]
    reductions = {"seq_mean": "sequence_mean", "elem_mean": "token_mean"}
    settings: dict[str, Any] = {
        "objective": divergence,
        "temperature": temperature,
        "square_temperature": False,
        "reduction": reductions.get(record["reduction"], record["reduction"]),
        "rows": {"source": torch.tensor([1, 2])},  # of CALD's two responses; no other objective reads it
    }
    if path == "logits":
        student = inputs["student_logits"].clone().requires_grad_()
        loss = distillation_loss(student, inputs["teacher_logits"], labels, **settings)
        (gradient,) = torch.autograd.grad(loss, student)
    else:  # logits = hidden · Qᵀ with an orthogonal head Q
        head = orthogonal(vocabulary, inputs["student_logits"].dtype)
        student = (inputs["student_logits"] @ head).requires_grad_()
        teacher = inputs["teacher_logits"] @ head
        compiled = True if path == "compiled" else None
        if compiled:
            torch.compiler.reset()  # a process may compile 256 graphs of one function, and there are more records
        loss = fused_distillation_loss(student, head, teacher, head, labels, chunk=4, compile=compiled, **settings)
        (gradient,) = torch.autograd.grad(loss, student)
        gradient = gradient @ head.T
    factor = 1 / vocabulary if record["reduction"] == "elem_mean" else 1.0
    if reference(record)["name"] == "cald":
        factor = 2.0
    return loss.detach() * factor, gradient * factor


def expected(record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the reference implementation."""
    inputs, r = arrays(f"inputs_{record['case']}"), reference(record)
    temperature = r.get("temperature", 1.0)
    student = inputs["student_logits"].double().requires_grad_()
    p = (inputs["teacher_logits"].double() / temperature).softmax(-1)
    losses = reference_loss(p, (student / temperature).softmax(-1), r)
    loss = reduce(losses, inputs["labels"], record["reduction"], student.shape[-1])
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def assert_gradient(mine: Tensor, wanted: Tensor) -> None:
    assert (mine.double() - wanted.double()).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name: str, path: str) -> None:
    record = RECORDS[name]
    r = reference(record)
    loss, gradient = run(path, record, objective(record, r), r.get("temperature", 1.0))
    assert loss.item() == pytest.approx(record["reference_loss"], rel=TOLERANCE)
    board, board_gradient = expected(record)
    assert board.item() == pytest.approx(record["reference_loss"], rel=1e-6)
    assert_gradient(gradient, board_gradient)
    official = arrays(f"official_{record['case']}")
    for key in record["arrays"]:
        if key.endswith("/grad") and record["agrees"]:
            assert_gradient(gradient, official[key])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALPHANET)
def test_alphanet_is_the_larger_of_two_alpha_divergences(name: str, path: str) -> None:
    record = RECORDS[name]
    both = [run(path, record, AlphaDivergence(record["hyper"][a]), 1.0) for a in ("a1", "a2")]
    loss, gradient = max(both, key=lambda pair: pair[0].item())
    assert loss.item() == pytest.approx(record["reference_loss"], rel=TOLERANCE)
    assert_gradient(gradient, arrays(f"official_{record['case']}")[record["arrays"][1]])


@pytest.mark.parametrize("name", [name for name in LOSSES if ".adaptive." in name])
def test_the_skew_of_each_response_is_the_official_one(name: str) -> None:
    record = RECORDS[name]
    inputs, columns = arrays(f"inputs_{record['case']}"), {}
    counted = inputs["labels"] != -100
    for model in ("teacher", "student"):  # in float64: m / g ≈ 1, so that α magnifies what the official fp32 rounds off
        tokens = inputs[f"{model}_logits"].double().log_softmax(-1)
        tokens = tokens.gather(-1, inputs["labels"].clamp_min(0).unsqueeze(-1)).squeeze(-1)
        columns[f"{model}_log_prob"] = (tokens * counted).sum(1) / counted.sum(1)
    alpha = followed(record["hyper"], "student" if "srkl" in name else "teacher")(columns)
    wanted = torch.tensor(record["hyper"]["alpha_rows"], dtype=torch.float64)
    torch.testing.assert_close(alpha, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_taid_moves_as_the_official_schedule(name: str) -> None:
    hyper = RECORDS[name]["hyper"]
    trace = {key.split("/")[1]: arrays("official_schedules")[key] for key in RECORDS[name]["arrays"]}
    schedule = TAIDSchedule(
        hyper["t_start"],
        hyper.get("t_end", 1.0),
        hyper.get("alpha", 5e-4),
        hyper.get("beta", 0.99),
        adaptive=not hyper.get("disable_adaptive", False),
    )
    for step, loss in enumerate(trace["losses"]):
        schedule.update(step / hyper["num_train_steps"], {"kd": loss})
        assert schedule().item() == pytest.approx(trace["t"][step].item(), abs=1e-6)
        if schedule.adaptive:
            assert schedule.trend.item() == pytest.approx(trace["momentum"][step].item(), abs=1e-7)
