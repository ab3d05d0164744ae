"""The engine: chunks, LM heads, unneeded products that are skipped, and memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning.engine import token_loss
from kd_lightning.engine.head import Head
from kd_lightning.losses import DistillationLoss, fused_distillation_loss
from slow_reference import (
    DetachedMixture,
    Forward,
    Hellinger,
    Reverse,
    error,
    logits,
    problem,
    reduce,
    results,
    token_losses,
)


# ------------------------------------------------------------------------------------------------------------ chunks
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_any_chunk_and_any_block_equals_the_whole(monkeypatch: pytest.MonkeyPatch, ce_weight: float) -> None:
    arguments = problem()
    whole = results(arguments, objective=Reverse(), ce_weight=ce_weight, chunk=1000)
    for entries in (1, 23 * 9):  # blocks of 8 tokens, of 9
        monkeypatch.setattr(token_loss, "EAGER_ENTRIES", entries)
        for chunk in (1, 2, 3, 10, 11, 12, None):
            split = results(arguments, objective=Reverse(), ce_weight=ce_weight, chunk=chunk)
            assert max(map(error, split, whole)) < 1e-13


def test_strides_of_the_inputs_do_not_matter() -> None:
    arguments = problem()
    whole = results(arguments, objective=Reverse())
    for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head"):
        x = arguments[name].detach()
        wide = torch.stack([x, x], -1)[..., 0].transpose(-1, -2).contiguous().transpose(-1, -2)
        arguments[name] = wide.requires_grad_(arguments[name].requires_grad)
    assert max(map(error, results(arguments, objective=Reverse()), whole)) < 1e-13


# ------------------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("settings", [{}, {"ce_weight": 0.3, "temperature": 2.0}, {"ce_weight": 1.0}], ids=str)
@pytest.mark.parametrize(
    "head", [{"bias": True}, {"scale": 0.3}, {"softcap": 2.0}, {"bias": True, "scale": -1.7, "softcap": 1.5}], ids=str
)
def test_bias_scale_and_softcap_equal_whole_logits(head: dict[str, Any], settings: dict[str, Any]) -> None:
    arguments = problem()
    bias = torch.randn(23, dtype=torch.float64)
    leaves = [arguments["student_hidden"], arguments["student_head"]]
    heads = []
    for weight, b in (
        (arguments["student_head"], bias.requires_grad_()),
        (arguments["teacher_head"], bias.detach() + 1),
    ):
        heads.append(Head(weight, **{**head, "bias": b if head.get("bias") else None}))
    if head.get("bias"):
        leaves.append(bias)
    arguments["student_head"], arguments["teacher_head"] = heads
    student, teacher = (logits(arguments[f"{r}_hidden"], arguments[f"{r}_head"]) for r in ("student", "teacher"))
    expected = reduce(token_losses(student, teacher, arguments["labels"], Reverse(), **settings), "sum")
    loss = fused_distillation_loss(**arguments, objective=Reverse(), reduction="sum", chunk=4, **settings)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, leaves)
    assert max(map(error, torch.autograd.grad(loss, leaves), wanted)) < 1e-12


@pytest.mark.parametrize("reduction", ["token_mean", "none"])
def test_finite_differences(reduction: str) -> None:
    arguments = problem(n=3, vocabulary=5)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, scale=1.3, softcap=3.0)
        return fused_distillation_loss(
            **{**arguments, "student_hidden": hidden, "student_head": head},
            objective=Hellinger(),
            ce_weight=0.3,
            temperature=1.5,
            reduction=reduction,
            chunk=2,
        )

    assert torch.autograd.gradcheck(loss, (arguments["student_hidden"], arguments["student_head"], bias))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(3)}, r"head weight must be \[vocabulary, hidden width\], got shape \[3\]"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"head bias must be \[3\].*got \[2\]"),
        ({"weight": torch.zeros(3, 2), "scale": 0.0}, "head scale must be at least 1e-06 or at most -1e-06, got 0.0"),
        (
            {"weight": torch.zeros(3, 2), "softcap": 0.0},
            r"head softcap must be a number in \[1e-06, 1e\+06\] or None, got 0.0",
        ),
    ],
)
def test_a_head_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Head(**arguments)


# -------------------------------------------------------------------------------------------- gradients on demand only
class Watch(TorchDispatchMode):
    """Counts matrix products by the shape of their result, and the bytes of tensors allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.largest = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(tuple(out.shape))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        self.largest = max(self.largest, size)
        if key in self.known or key == 0:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def products(arguments: dict[str, Any], **settings: Any) -> list[tuple[int, ...]]:
    with Watch() as watch:
        loss = fused_distillation_loss(**arguments, objective=Reverse(), compile=False, **settings)
        if loss.requires_grad and loss.ndim == 0:
            loss.backward()
    return watch.products


def test_only_wanted_gradients_are_computed() -> None:
    n, vocabulary, width = 11, 23, 4
    logit, d_hidden, d_weight = (n, vocabulary), (n, width), (vocabulary, width)
    arguments = problem()
    assert sorted(products(arguments)) == sorted([logit, logit, d_hidden, d_weight])
    frozen_head = {**arguments, "student_head": arguments["student_head"].detach()}
    assert sorted(products(frozen_head)) == sorted([logit, logit, d_hidden])
    frozen_body = {**arguments, "student_hidden": arguments["student_hidden"].detach()}
    assert sorted(products(frozen_body)) == sorted([logit, logit, d_weight])
    with torch.no_grad():
        assert products(arguments) == [logit, logit]
    with torch.inference_mode():
        assert products(arguments) == [logit, logit]
    assert len(products(arguments, reduction="none")) == 2  # values only
    assert products({**arguments, "teacher_hidden": None, "teacher_head": None}, ce_weight=1.0).count(logit) == 1


def test_the_gradient_is_the_same_whatever_else_is_frozen() -> None:
    arguments = problem()
    _, d_hidden, d_weight = results(arguments, objective=Reverse(), ce_weight=0.2)
    for frozen, leaf, wanted in (
        ("student_head", "student_hidden", d_hidden),
        ("student_hidden", "student_head", d_weight),
    ):
        part = {**arguments, frozen: arguments[frozen].detach()}
        loss = fused_distillation_loss(**part, objective=Reverse(), ce_weight=0.2)
        assert torch.equal(torch.autograd.grad(loss, part[leaf])[0], wanted)


def test_a_tied_head_gets_both_its_gradients() -> None:
    arguments = problem()
    embedding = arguments["student_head"]
    ids = torch.arange(11)
    gradients = []
    for fused in (True, False):
        hidden = torch.tanh(embedding[ids]).unsqueeze(0)
        if fused:
            loss = fused_distillation_loss(**{**arguments, "student_hidden": hidden}, objective=Reverse(), chunk=3)
        else:
            teacher = logits(arguments["teacher_hidden"], Head(arguments["teacher_head"]))
            student = logits(hidden, Head(embedding))
            loss = reduce(token_losses(student, teacher, arguments["labels"], Reverse()), "token_mean")
        gradients.append(torch.autograd.grad(loss, embedding)[0])
    assert error(*gradients) < 1e-13


def test_backward_scales_and_may_be_asked_again() -> None:
    arguments = problem()
    leaves = (arguments["student_hidden"], arguments["student_head"])
    wanted = results(arguments, objective=Reverse(), reduction="sequence_mean")[1:]
    loss = fused_distillation_loss(**arguments, objective=Reverse(), reduction="sequence_mean")
    for factor in (-0.37, 2.0, 1.0):
        mine = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        assert max(error(a, factor * b) for a, b in zip(mine, wanted, strict=True)) < 1e-14
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_accumulate_over_calls() -> None:
    arguments = problem()
    _, d_hidden, d_weight = results(arguments, objective=Reverse())
    for _ in range(2):
        fused_distillation_loss(**arguments, objective=Reverse()).backward()
    torch.testing.assert_close(arguments["student_hidden"].grad, 2 * d_hidden)
    torch.testing.assert_close(arguments["student_head"].grad, 2 * d_weight)


# ------------------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("n", [256, 1024])
def test_nothing_but_two_tiles_and_the_gradients_lives_with_every_monitor_on(
    monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    vocabulary, chunk, widths = 4001, 64, (16, 24)
    arguments = problem(n, vocabulary, torch.float32, widths)
    monitors = {"forward_kl": Forward(), "reverse_kl": Reverse(), "hellinger": Hellinger()}
    loss = DistillationLoss(
        DetachedMixture(),
        ce_weight=0.5,
        temperature=2.0,
        chunk=chunk,
        monitors=monitors,
        diagnostics=True,
        compile=False,
    )
    monkeypatch.setattr(token_loss, "EAGER_ENTRIES", 1)
    tile = 4 * chunk * vocabulary
    with Watch() as watch:
        loss.from_hidden(**arguments).mean.backward()
    floor = 2 * tile + 4 * vocabulary * widths[0] + 4 * n * widths[0]
    assert watch.largest < 1.05 * tile
    assert 2 * tile < watch.peak < 1.05 * floor + 24 * 4 * 8 * vocabulary  # plus temporaries of one block of 8 tokens


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "EAGER_ENTRIES", 1)
    peaks = []
    for n in (128, 512):
        arguments = problem(n, 4001, torch.float32, (16, 24))
        with Watch() as watch:
            fused_distillation_loss(**arguments, objective=Reverse(), chunk=64, compile=False).backward()
        peaks.append(watch.peak - 4 * n * 16)
    floor = 2 * 4 * 64 * 4001 + 4 * 4001 * 16
    assert peaks[1] < 1.02 * peaks[0]
    assert peaks[1] < 1.02 * floor + 16 * 4 * 8 * 4001  # some temporaries of one block of 8 tokens
