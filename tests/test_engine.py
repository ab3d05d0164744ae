"""The engine: chunks, heads, what costs nothing when it is not wanted, memory, and the compiled step."""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kd_lightning.compiling
import kd_lightning.token_loss
from kd_lightning.divergences import Divergence, evaluate
from kd_lightning.engine import Head
from kd_lightning.losses import DistillationLoss, fused_distillation_loss
from kd_lightning.schedules import Schedule
from leaves import ALL
from slow_reference import DetachedMixture, Forward, Hellinger, Reverse, error, logits, reduce, token_losses

# inductor itself calls what torch has deprecated
ignore_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def problem(
    n: int = 11, vocabulary: int = 23, dtype: torch.dtype = torch.float64, widths: tuple[int, int] = (4, 6)
) -> dict[str, Any]:
    """Arguments of `fused_distillation_loss` for one response of n tokens, all counted."""
    g = torch.Generator().manual_seed(3)
    student, teacher = widths
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "student_hidden": randn(1, n, student).requires_grad_(),
        "student_head": randn(vocabulary, student).requires_grad_(),
        "teacher_hidden": randn(1, n, teacher),
        "teacher_head": randn(vocabulary, teacher),
        "labels": torch.randint(0, vocabulary, (1, n), generator=g),
    }


def results(arguments: dict[str, Any], **settings: Any) -> tuple[Tensor, ...]:
    loss = fused_distillation_loss(**arguments, **{"compile": False, **settings})
    return loss, *torch.autograd.grad(loss, (arguments["student_hidden"], arguments["student_head"]))


# ------------------------------------------------------------------------------------------------------------ chunks
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_any_chunk_and_any_block_equals_the_whole(monkeypatch: pytest.MonkeyPatch, ce_weight: float) -> None:
    arguments = problem()
    whole = results(arguments, objective=Reverse(), ce_weight=ce_weight, chunk=1000)
    for entries in (1, 23 * 9):  # blocks of 8 rows, of 9
        monkeypatch.setattr(kd_lightning.token_loss, "EAGER_ENTRIES", entries)
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
        ({"weight": torch.zeros(3, 2), "scale": 0.0}, "head scale must not be 0"),
        ({"weight": torch.zeros(3, 2), "softcap": 0.0}, "head softcap must be > 0 or None, got 0.0"),
    ],
)
def test_a_head_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Head(**arguments)


# -------------------------------------------------------------------------------------------- gradients on demand only
class Watch(TorchDispatchMode):
    """Counts matrix products by the shape of their result, and the bytes alive of what was made inside."""

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
    assert len(products(arguments, reduction="none")) == 2  # values alone
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
    monkeypatch.setattr(kd_lightning.token_loss, "EAGER_ENTRIES", 1)
    tile = 4 * chunk * vocabulary
    with Watch() as watch:
        loss.from_hidden(**arguments).mean.backward()
    floor = 2 * tile + 4 * vocabulary * widths[0] + 4 * n * widths[0]
    assert watch.largest < 1.05 * tile
    assert 2 * tile < watch.peak < 1.05 * floor + 24 * 4 * 8 * vocabulary  # and the temporaries of one block of 8 rows


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_lightning.token_loss, "EAGER_ENTRIES", 1)
    peaks = []
    for n in (128, 512):
        arguments = problem(n, 4001, torch.float32, (16, 24))
        with Watch() as watch:
            fused_distillation_loss(**arguments, objective=Reverse(), chunk=64, compile=False).backward()
        peaks.append(watch.peak - 4 * n * 16)
    floor = 2 * 4 * 64 * 4001 + 4 * 4001 * 16
    assert peaks[1] < 1.02 * peaks[0]
    assert peaks[1] < 1.02 * floor + 16 * 4 * 8 * 4001  # some temporaries of one block of 8 rows


# ---------------------------------------------------------------------------------------------------------- compiled
class NotCompilable(Divergence):
    """Asks the device for a number, as many a first draft does."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        loss = Reverse()(log_p, log_q)
        return loss * (1.0 if loss.sum().item() > -1 else 2.0)


def test_what_does_not_compile_runs_eagerly_after_one_warning() -> None:
    arguments = problem(dtype=torch.float32)
    expected = results(arguments, objective=NotCompilable(), ce_weight=0.1)
    loss = DistillationLoss(NotCompilable(), ce_weight=0.1, compile=True, chunk=4)
    with pytest.warns(UserWarning, match="does not compile and runs eagerly") as caught:
        parts = loss.from_hidden(**arguments)
    assert len(caught) == 1
    for _ in range(2):
        leaves = (arguments["student_hidden"], arguments["student_head"])
        mine = parts.mean, *torch.autograd.grad(parts.mean, leaves)
        assert max(map(error, mine, expected)) < 1e-6
        parts = loss.from_hidden(**arguments)


def test_without_a_compiler_it_runs_eagerly_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler(*args: Any, **kwargs: Any) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch, "compile", lambda function, **settings: no_compiler)
    arguments = problem(dtype=torch.float32)
    expected = results(arguments, objective=Reverse())
    with pytest.warns(UserWarning, match="runs eagerly"):
        mine = results(arguments, objective=Reverse(), compile=True)
    assert max(map(error, mine, expected)) < 1e-6


def test_a_fault_in_the_users_code_shows_in_its_own_words() -> None:
    class Faulty(Divergence):
        def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            raise ValueError("I need a column")

    with pytest.raises(ValueError, match="I need a column"), warnings.catch_warnings():
        fused_distillation_loss(**problem(dtype=torch.float32), objective=Faulty(), compile=True)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compilations asked for; the function itself is called in their place."""
    asked: list[str] = []

    def compile(function: Any, **settings: Any) -> Any:
        asked.append(str(settings))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_compiling_is_chosen_once_by_the_first_call_that_takes_a_gradient(
    monkeypatch: pytest.MonkeyPatch, count: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kd_lightning")
    small, large = problem(n=11), problem(n=40)
    monkeypatch.setattr(kd_lightning.token_loss, "BREAK_EVEN", 20 * 23)
    loss = DistillationLoss(Reverse())
    with torch.no_grad():
        loss.from_hidden(**large)
    assert not count
    loss.from_hidden(**small)
    loss.from_hidden(**large)
    assert not count
    other = DistillationLoss(Reverse())
    other.from_hidden(**large)
    other.from_hidden(**small)
    assert len(count) == 1
    assert [record.message for record in caplog.records] == ["compiling the loss: the first step takes longer"]
    assert not DistillationLoss(Reverse(), compile=False).from_hidden(**large).loss.isnan()
    assert len(count) == 1


def test_a_resumed_run_keeps_the_choice(monkeypatch: pytest.MonkeyPatch, count: list[str]) -> None:
    monkeypatch.setattr(kd_lightning.token_loss, "BREAK_EVEN", 20 * 23)
    for first, second, compiled in ((problem(n=40), problem(n=11), True), (problem(n=11), problem(n=40), False)):
        count.clear()
        run, resumed = DistillationLoss(Reverse()), DistillationLoss(Reverse())
        run.from_hidden(**first)
        resumed.load_state_dict(run.state_dict())
        count.clear()
        resumed.from_hidden(**second)
        assert bool(count) == compiled


def test_the_functional_form_compiles_once_per_objective(count: list[str]) -> None:
    objective = Reverse()
    for _ in range(3):
        fused_distillation_loss(**problem(), objective=objective, compile=True)
    assert len(count) == 1
    fused_distillation_loss(**problem(), objective=Reverse(), compile=True)
    assert len(count) == 2


class Moving(Schedule):
    """A schedule whose value lives in a buffer, as they do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("now", torch.tensor(0.25))

    def forward(self, rows: Any = None) -> Tensor:
        return self.now

    def update(self, progress: Any, stats: Any) -> None:
        self.now.fill_(progress)


class Mixed(Divergence):
    """A divergence with a schedule inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Moving()

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        weight = self.weight()
        return weight * Forward()(log_p, log_q) + (1 - weight) * Reverse()(log_p, log_q)


@pytest.mark.slow
@ignore_torch
def test_one_graph_serves_all_steps_rows_and_schedule_values_with_the_eager_numbers() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    objective = Mixed()
    compiled, eager = (
        DistillationLoss(objective, ce_weight=0.2, temperature=2.0, compile=c, chunk=chunk)
        for c, chunk in ((True, 40), (False, None))
    )
    for step, n in enumerate((100, 7, 64, 129, 1)):
        objective.weight.update(0.1 * step, {})
        for autocast in (False, True):
            arguments = problem(n, 211, torch.float32)
            leaves = (arguments["student_hidden"], arguments["student_head"])
            found = []
            for loss in (compiled, eager):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    parts = loss.from_hidden(**arguments)
                found.append((parts.loss, *torch.autograd.grad(parts.loss, leaves), *parts.values.values()))
            assert max(map(error, *found)) < 2e-6
        if step == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs
    assert graphs <= 2  # with and without autocast around it
    assert not counters["graph_break"]


@pytest.mark.slow
@ignore_torch
def test_more_than_eight_objectives_compile_in_one_process() -> None:
    torch._dynamo.reset()
    arguments = problem(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            objective = Mixed()
            expected = results(arguments, objective=objective)
            assert max(map(error, results(arguments, objective=objective, compile=True), expected)) < 2e-6


# ------------------------------------------------------------------------------------------------------- every leaf
def models(dtype: torch.dtype, near: bool) -> dict[str, Any]:
    """Two models on 48 tokens, in a dtype; nearly the same, or not."""
    g = torch.Generator().manual_seed(4)
    n, vocabulary, width = 48, 2048, 64
    hidden, weight, other, elsewhere = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((1, n, width), (vocabulary, width), (vocabulary, width), (1, n, width))
    )
    return {
        "student_hidden": hidden.requires_grad_(),
        "student_head": (weight / 4).requires_grad_(),
        "teacher_hidden": hidden.detach() if near else elsewhere,
        "teacher_head": (weight + 0.05 * other if near else other) / 4,
        "labels": torch.randint(0, vocabulary, (1, n), generator=g),
    }


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=(pytest.mark.slow, ignore_torch))])
@pytest.mark.parametrize("name", ALL)
def test_every_leaf_is_as_exact_as_its_dtype_far_and_near(name: str, compile: bool) -> None:
    leaf = ALL[name]
    objective = leaf.make()
    has_kinks = name in (
        "TotalVariation",
        "WeightedSum",
    )  # |p − q|: where p = q to rounding, its sign is anybody's guess
    for near in (False, True):
        for dtype, bound in ((torch.float32, 5e-5 if near else 3e-6), (torch.bfloat16, 2.5e-3)):
            arguments = models(dtype, near)
            leaves = [arguments[key].detach().double().requires_grad_() for key in ("student_hidden", "student_head")]
            teacher = arguments["teacher_hidden"].double() @ arguments["teacher_head"].double().T
            log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(leaves[0] @ leaves[1].T, -1)
            expected = evaluate(objective, log_p, log_q, leaf.columns(log_p)).mean()
            loss, *mine = results(arguments, objective=objective, compile=compile, rows=leaf.columns(log_p))
            assert error(loss, expected) < (5e-4 if near else 3e-6)
            worst = max(map(error, mine, torch.autograd.grad(expected, leaves)))
            assert worst < (2e-3 if has_kinks and near and dtype == torch.float32 else bound)
