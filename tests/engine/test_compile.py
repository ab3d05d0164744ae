"""The compiled step: chosen once, one graph, the eager results, and the eager fallback."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.divergences import Divergence, evaluate
from kd_lightning.engine import token_loss
from kd_lightning.losses import DistillationLoss, fused_distillation_loss
from kd_lightning.schedules import Schedule
from leaves import ALL
from slow_reference import (
    Forward,
    Reverse,
    error,
    problem,
    results,
)

DEVICES = ("cpu", "cuda")

# inductor itself calls functions that torch has deprecated
ignore_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class NotCompilable(Divergence):
    """Reads a number from the device, a common mistake."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        loss = Reverse()(log_p, log_q)
        return loss * (1.0 if loss.sum().item() > -1 else 2.0)


def test_an_objective_that_does_not_compile_runs_eagerly_after_one_warning() -> None:
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


@ignore_torch
def test_without_a_compiler_it_runs_eagerly_after_one_warning() -> None:
    import torch._inductor.config as config

    arguments = problem(dtype=torch.float32)
    expected = results(arguments, objective=Reverse())
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.warns(UserWarning, match="runs eagerly") as caught:
            mine = results(arguments, objective=Reverse(), compile=True)
    assert sum("runs eagerly" in str(warning.message) for warning in caught) == 1
    assert max(map(error, mine, expected)) < 1e-6


def test_the_log_message_appears_once_without_a_logging_configuration() -> None:
    code = """
import logging
from kd_lightning.console import enable_info_logging
enable_info_logging()
enable_info_logging()
logging.getLogger("kd_lightning").info("compiling")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert said == "compiling\n"


def test_an_error_in_the_users_code_keeps_its_message() -> None:
    class Faulty(Divergence):
        def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            raise ValueError("I need a column")

    with pytest.raises(ValueError, match="I need a column"), warnings.catch_warnings():
        fused_distillation_loss(**problem(dtype=torch.float32), objective=Faulty(), compile=True)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records calls of `torch.compile`, which returns the function itself."""
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
    monkeypatch.setattr(token_loss, "BREAK_EVEN", 20 * 23)
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
    monkeypatch.setattr(token_loss, "BREAK_EVEN", 20 * 23)
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
    """A schedule whose value is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("now", torch.tensor(0.25))

    def forward(self, rows: Any = None) -> Tensor:
        return self.now

    def update(self, progress: Any, stats: Any) -> None:
        self.now.fill_(progress)


class Mixed(Divergence):
    """A divergence with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Moving()

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        weight = self.weight()
        return weight * Forward()(log_p, log_q) + (1 - weight) * Reverse()(log_p, log_q)


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
    assert compiled.token_loss.compiled.chosen  # it did not fall back
    assert counters["stats"]["unique_graphs"] == graphs
    assert 1 <= graphs <= 2  # with and without autocast around it
    assert not counters["graph_break"]


@pytest.mark.slow
@ignore_torch
def test_more_than_eight_objectives_compile_in_one_process() -> None:
    torch._dynamo.reset()
    arguments = problem(dtype=torch.float32)
    for _ in range(10):  # the eager fallback warns, and a warning is an error in the tests
        objective = Mixed()
        expected = results(arguments, objective=objective)
        assert max(map(error, results(arguments, objective=objective, compile=True), expected)) < 2e-6


# ------------------------------------------------------------------------------------------------------- every leaf
def models(dtype: torch.dtype, near: bool) -> dict[str, Any]:
    """Two models on 48 tokens in a dtype, nearly equal or different."""
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
    )  # |p − q|: where p = q up to rounding, its sign is arbitrary
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


@pytest.mark.parametrize("vocabulary", [10, 257, 4099, 32768, 50257, 151936])
def test_shapes_of_blocks_do_not_follow_the_number_of_rows(vocabulary: int) -> None:
    token_loss = DistillationLoss(Forward(), compile=True).token_loss
    assert token_loss.is_compiled
    sizes = {d: {token_loss.block_size(n, vocabulary, torch.device(d)) for n in range(3000)} for d in DEVICES}
    assert len(sizes["cpu"]) == 1
    assert len(sizes["cuda"]) <= 9
    assert all(size >= 32 and size % 32 == 0 for found in sizes.values() for size in found)
