"""Arguments of a wrong type: every constructor and both losses raise a ValueError with the argument's name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import leaves
from kd_lightning import DistillationLoss, DistillationModule, distillation_loss, fused_distillation_loss
from kd_lightning.divergences import Divergence, ForwardKL, ReverseKL
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK
from kd_lightning.label_losses import ClippedPolicyGradient, CrossEntropy, SampledReverseKL
from kd_lightning.models.lora import LoRA
from kd_lightning.objectives import OnSource
from kd_lightning.objectives.objective import Complement
from kd_lightning.rollout.on_policy import OnPolicy
from kd_lightning.schedules import Linear
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.token_weights import GapGate
from kd_lightning.training.loss_components import PartialKL

CLASSES = sorted(
    {type(leaf.make()) for leaf in leaves.ALL.values()}
    | {type(make()) for make, _ in leaves.ASSISTANTS.values()}
    | {type(make()) for make in (*leaves.SCHEDULES.values(), *leaves.RESPONSES.values())}
    | {ClippedPolicyGradient, SampledReverseKL, Complement, OnSource, PartialKL},
    key=lambda leaf: leaf.__name__,
)
NEEDED = {  # values of arguments without a default
    "alpha": 0.3,
    "beta": 0.4,
    "divergence": ForwardKL(),
    "divergences": [ForwardKL()],
    "weights": [1.0],
    "teacher_weight": 0.3,
    "start": 0.2,
    "end": 0.8,
    "schedule": Linear(0.2, 0.8),
    "student": True,
    "part": "tail",
    "k": 3,
    "threshold": 0.5,
    "share": 0.5,
    "weight": GapGate(),
}
# Numbers and text that no argument takes, whatever it stands for; none of them is of the wanted type by accident.
WRONG: list[Any] = [
    math.nan,
    [0.5],
    {"a": 1},
    10**400,
    object(),
    torch.ones(2),
    np.ones(3),
    "text",
    b"b",
    ForwardKL,
    float,
]
BY_KIND = {"bool": [1, 0.0, None], "float": [True, "0.5", 1j], "int": [True, 1.5, "3"], "str": [3, True, ("covering",)]}


def wrong_values(parameter: inspect.Parameter) -> list[Any]:
    kind = str(parameter.annotation)
    values = list(WRONG)
    for name, more in BY_KIND.items():
        if kind.startswith(name) or (name == "float" and kind.startswith("Weight")):
            values += more
    if "None" not in kind:
        values.append(None)
    if kind.startswith("list[Weight"):
        values.remove([0.5])
    if "int" in kind:
        values.remove(10**400)  # an integer, if not a sensible one
    return values


def arguments_of(leaf: type) -> dict[str, inspect.Parameter]:
    """Those of the constructor; a leaf without one takes torch's `*args`."""
    named = inspect.signature(leaf).parameters.items()
    return {name: parameter for name, parameter in named if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}


def abuses() -> Iterator[tuple[type, str, Any]]:
    for leaf in CLASSES:
        for name, parameter in arguments_of(leaf).items():
            yield from ((leaf, name, value) for value in wrong_values(parameter))


def test_every_argument_of_every_leaf() -> None:
    count = 0
    for leaf, name, value in abuses():
        required = {
            key: NEEDED[key]
            for key, parameter in arguments_of(leaf).items()
            if parameter.default is inspect.Parameter.empty
        }
        leaf(**required)
        with pytest.raises(ValueError) as refusal:
            leaf(**{**required, name: value})
            pytest.fail(f"{leaf.__name__}({name}={value!r}) is accepted")
        text = str(refusal.value)
        assert name in text and "\n" not in text, f"{leaf.__name__}({name}={value!r}): {text}"
        count += 1
    assert count > 500


# -------------------------------------------------------------------------------------------------------- both losses
IDS = torch.tensor([[1, 2, -100], [0, 4, 3]])


def tensors(form: str) -> dict[str, Any]:
    """Arguments of one of the loss functions."""
    numbers = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 3, 4, generator=numbers), torch.randn(5, 4, generator=numbers)
    if form == "logits":
        return {"student_logits": hidden @ head.T, "teacher_logits": 2 * hidden @ head.T, "labels": IDS}
    return {
        "student_hidden": hidden,
        "student_head": head,
        "teacher_hidden": 2 * hidden,
        "teacher_head": Head(head),
        "labels": IDS,
    }


FUNCTIONS = {"logits": distillation_loss, "hidden": fused_distillation_loss}
SETTINGS: dict[str, list[Any]] = {
    "objective": [ForwardKL, "ForwardKL", None, 0.5, [ForwardKL()], torch.nn.KLDivLoss()],
    "ce_weight": [[0.5], "0.5", None, True, torch.tensor(0.5), np.array([0.1]), math.nan, {}],
    "temperature": ["2", [2.0], None, True, 1e30, 1e-30, 1001, -2.0, math.inf, math.nan, 10**400, torch.tensor(2.0)],
    "reduction": [None, 3, ["sum"], "mean", torch.sum, np.array(["sum", "sum"])],
    "label_loss": [CrossEntropy, "ce", 1.0, ForwardKL()],
    "square_temperature": ["no", 1, None, [True]],
    "rows": [
        *([torch.zeros(2)], "source", 7, {"source": [0, 1]}, {"source": np.zeros(2)}, {3: torch.zeros(2)}),
        *({"source": None}, {"source": torch.zeros(2, dtype=torch.complex64)}),
    ],
    "chunk": [1.5, "64", [64], True, 0, -1],
    "compile": ["no", 1, 0.0, [True]],
}
INPUTS: list[Any] = [
    np.zeros((2, 3, 5)),
    [[0.0] * 3] * 2,
    3.5,
    "text",
    torch.zeros(2, 3, 5, dtype=torch.complex64),
    torch.zeros(2, 3, 5, dtype=torch.bool),
    torch.zeros(2, 3, 5).to_sparse(),
    torch.zeros(3, 5),
    torch.zeros(2, 3),
    torch.zeros(()),
    torch.nn.Linear(4, 5),
]
LABELS: list[Any] = [
    None,
    [[1]],
    np.ones((2, 3), int),
    3,
    IDS.float(),
    IDS.bool(),
    IDS[0],
    IDS[:, :2],
    IDS.unsqueeze(0),
]


def refused(form: str, name: str, value: Any) -> None:
    arguments = {"objective": ForwardKL(), **tensors(form), name: value}
    with pytest.raises(ValueError) as refusal:
        FUNCTIONS[form](**arguments)
        pytest.fail(f"{name}={value!r} is accepted")
    text = str(refusal.value)
    words = name.replace("_head", "") if name.endswith("head") else name  # "head weight must be …"
    assert (words in text or "head" in text) and "\n" not in text and len(text) < 600, text


@pytest.mark.parametrize("form", FUNCTIONS)
def test_every_setting_of_a_loss(form: str) -> None:
    for name, values in SETTINGS.items():
        if name in inspect.signature(FUNCTIONS[form]).parameters:
            for value in values:
                refused(form, name, value)
                if name != "rows":
                    with pytest.raises(ValueError, match=name):
                        DistillationLoss(**{"objective": ForwardKL(), name: value})
    with pytest.raises(ValueError, match="diagnostics must be True or False, got 'yes'"):
        DistillationLoss(ForwardKL(), diagnostics="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FUNCTIONS)
def test_every_tensor_of_a_loss(form: str) -> None:
    for name in tensors(form):
        for value in LABELS if name == "labels" else INPUTS:
            refused(form, name, value)
    refused(form, "student_logits" if form == "logits" else "student_hidden", None)
    refused(form, "teacher_head", None) if form == "hidden" else None
    refused(form, "teacher_logits" if form == "logits" else "teacher_hidden", tensors(form)["labels"])


@pytest.mark.parametrize(
    "monitors", [[ForwardKL()], "kl", 3, {"a": ForwardKL}, {"a": None}, {3: ForwardKL()}, {None: 1}]
)
def test_monitors(monitors: Any) -> None:
    for make in (DistillationLoss, lambda **kwargs: DistillationModule("asset:student", "asset:teacher", **kwargs)):
        with pytest.raises(ValueError, match="monitors"):
            make(objective=ForwardKL(), monitors=monitors)


MODULE: dict[str, list[Any]] = {
    "student": [None, 3, torch.nn.Linear, ["asset:student"], Path("folder"), {"path": "asset:student"}],
    "teacher": [3, HFTeacher, ["asset:teacher"], Path("folder"), True],
    "objective": [ForwardKL, "kl", None],
    "ce_weight": ["0.5", [0.5], None],
    "temperature": ["2", 1e30, None],
    "reduction": ["none", None, ["sum"]],
    "responses": ["on_policy", OnPolicy, 0.5],
    "label_loss": [CrossEntropy, "ce"],
    "optimizer": [None, 1e-3, "adamw"],
    "lr_scheduler": [0.1, "cosine"],
    "student_init": [None, True, ["random"]],
    "student_kwargs": [["dtype"], "float32", 3],
    "teacher_kwargs": [["dtype"], "float32", 3],
    "lora": [8, {"r": 8}, LoRA],
    "teacher_cache": ["yes", 1, None],
    "gradient_checkpointing": ["yes", 1, None],
}


@pytest.mark.parametrize("name", MODULE)
def test_the_module(name: str) -> None:
    known = set(inspect.signature(DistillationModule).parameters)
    assert known - {"monitors"} == set(MODULE)
    for value in MODULE[name]:
        with pytest.raises(ValueError, match=rf"{name} must (not )?be") as refusal:
            DistillationModule(**{"student": "asset:student", "teacher": "asset:teacher", name: value})
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [{"weight": np.zeros((5, 4))}, {"weight": None}, {"weight": torch.zeros(5, 4, dtype=torch.int8)}]
    + [{"bias": [0.0] * 5}, {"bias": torch.zeros(5, dtype=torch.int64)}]
    + [{"scale": value} for value in (math.nan, math.inf, -math.inf, 0, 1e30, 1e-30, "1", None, True, [1.0])]
    + [{"softcap": value} for value in (math.nan, math.inf, 0, -30.0, 1e30, 1e-30, "30", True, [30.0])],
    ids=str,
)
def test_a_head(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"head {next(iter(change))} must be"):
        Head(**{"weight": torch.zeros(5, 4), **change})


def test_heads_in_range() -> None:
    for scale, softcap in ((0.0625, 30.0), (-1.0, None), (1e-6, 1e-6), (1e6, 1e6), (2, 50)):
        assert Head(torch.zeros(5, 4), scale=scale, softcap=softcap).transform == (scale, softcap)


@pytest.mark.parametrize(
    "change",
    [{"ids": [[1]]}, {"ids": torch.zeros(2, 3)}, {"log_probs": torch.zeros(2, 3, dtype=torch.int64)}]
    + [{"log_tail": None}, {"log_tail": torch.zeros(3)}, {"ids": torch.zeros(2, 4, dtype=torch.int64)}]
    + [{"vocabulary": value} for value in (0, 2.5, "5", None, True)],
    ids=str,
)
def test_top_k(change: dict[str, Any]) -> None:
    whole = {"ids": torch.zeros(2, 3, dtype=torch.int64), "log_probs": torch.zeros(2, 3), "log_tail": torch.zeros(2)}
    with pytest.raises(ValueError, match="TopK"):
        TopK(**{**whole, "vocabulary": 5, **change})


class Untensored(Divergence):
    """Returns what no loss can be."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, log_p: Any, log_q: Any) -> Any:
        return self.value


@pytest.mark.parametrize("value", [0.5, None, [1.0]])
def test_a_divergence_that_returns_no_tensor(value: Any) -> None:
    with pytest.raises(ValueError, match="Untensored must return a tensor with one value per token, got"):
        distillation_loss(**tensors("logits"), objective=Untensored(value))


@pytest.mark.parametrize("temperature", [0.001, 0.5, 20, 1000.0])
def test_temperatures_in_range(temperature: float) -> None:
    arguments = tensors("logits")
    student = arguments["student_logits"].requires_grad_()
    loss = distillation_loss(**arguments, objective=ReverseKL(), temperature=temperature)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


# ------------------------------------------------------------------------------------- tensors changed after the loss
def changed(form: str, name: str, context: Any) -> dict[str, Any]:
    arguments = tensors(form)
    with context():
        made = {key: value.clone() for key, value in arguments.items() if torch.is_tensor(value) and "teacher" in key}
        if form == "hidden":
            made["teacher_head"] = Head(arguments["teacher_head"].weight.clone(), torch.zeros(5).clone())
    return {**arguments, **made}


CHANGES = [
    (form, name)
    for form, names in {"logits": ["teacher_logits"], "hidden": ["teacher_hidden", "weight", "bias"]}.items()
    for name in names
]


@pytest.mark.parametrize(("form", "name"), CHANGES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("again", ["none", "retained"])
def test_a_teacher_changed_before_the_loss_is_computed_again(form: str, name: str, context: Any, again: str) -> None:
    arguments = changed(form, name, context)
    student = arguments["student_logits" if form == "logits" else "student_hidden"].requires_grad_()
    tensor = getattr(arguments["teacher_head"], name) if name in ("weight", "bias") else arguments[name]

    def loss() -> torch.Tensor:
        reduction = "none" if again == "none" else "token_mean"
        return FUNCTIONS[form](**arguments, objective=ForwardKL(), reduction=reduction).sum()

    unchanged = loss()
    unchanged.backward(retain_graph=True)
    first = student.grad.clone()
    unchanged.backward()
    torch.testing.assert_close(student.grad, 2 * first)  # nothing was changed: the same gradient again

    value = loss()
    if again == "retained":
        value.backward(retain_graph=True)
    with context():
        tensor[..., 1] += 0.5
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation: the teacher's logits, hidden states or LM"
    ):
        value.backward()


@pytest.mark.parametrize("form", FUNCTIONS)
def test_a_buffer_of_the_teacher_may_be_filled_again_before_the_only_backward(form: str) -> None:
    arguments = tensors(form)
    student = arguments["student_logits" if form == "logits" else "student_hidden"].requires_grad_()
    (wanted,) = torch.autograd.grad(FUNCTIONS[form](**arguments, objective=ForwardKL()), student)
    loss = FUNCTIONS[form](**arguments, objective=ForwardKL())
    arguments["teacher_logits" if form == "logits" else "teacher_hidden"].zero_()
    loss.backward()
    assert torch.equal(student.grad, wanted)
