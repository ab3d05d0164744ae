"""Accuracy of a loss: relative L2 error of its values and gradients against float64 on the same inputs.

Every loss is measured in fp32 and bf16, on two models that are far from each other and on two that are nearly equal.
With "hidden", the inputs are hidden states and the gradient is taken with respect to them and the LM head. With
"logits", the inputs are logits (rounded to the dtype) and the gradient is taken with respect to them. Compared with a
straightforward implementation, and with other libraries where they support the loss and are installed.

    python benchmarks/exactness.py --output build/exactness
    python benchmarks/exactness.py --quick

The float64 reference is this package's formula on full logits, with plain autograd.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine, write
from subjects import BETA, OBJECTIVES, PEERS, Inputs, naive, peer
from torch import Tensor

import kd_lightning as kd
from kd_lightning.divergences import evaluate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = (2048, 64, 128, 48)  # vocabulary, hidden sizes, tokens: the dtype matters, not the size
Ways = dict[str, Callable[[Inputs], Tensor]]


def two_models(dtype: torch.dtype, near: bool, shape: tuple[int, ...], device: str = "cpu") -> Inputs:
    """Student and teacher. If near, the teacher is the student with 5 % noise on its LM head."""
    g = torch.Generator().manual_seed(0)
    vocabulary, student, teacher, n = shape
    randn = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    h, w = randn(n, student), randn(vocabulary, student) / student**0.5
    ht, wt = randn(n, teacher), randn(vocabulary, teacher) / teacher**0.5
    if near:
        ht, wt = h, w + 0.05 * randn(vocabulary, student) / student**0.5
    x = {"h": 2 * h, "w": w, "ht": 2 * ht, "wt": wt}
    labels = torch.randint(0, vocabulary, (n,), generator=g)
    return {**{name: tensor.to(device, dtype) for name, tensor in x.items()}, "labels": labels.to(device)}


def reference(objective: kd.Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss on full logits."""
    return evaluate(objective, torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))


def error(mine: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance."""
    return float((mine.double() - wanted).norm() / wanted.norm())


def errors(values: Tensor, leaves: tuple[Tensor, ...], wanted: Tensor, gradients: tuple[Tensor, ...]) -> list[float]:
    """Error of the values, and the largest error of the gradients of their sum."""
    mine = torch.autograd.grad(values.sum(), leaves)
    return [error(values.detach(), wanted), max(map(error, mine, gradients))]


def from_hidden(name: str, compile: bool) -> Ways:
    """Implementations of the loss from hidden states."""
    loss = kd.DistillationLoss(OBJECTIVES[name](), reduction="none", compile=compile)
    ways: Ways = {
        "ours": lambda x: loss.from_hidden(x["h"], x["w"], x["ht"], x["wt"], x["labels"]).loss,
        "logits, fp32 softmax": lambda x: naive(x, OBJECTIVES[name]()),
    }
    for other in PEERS if name in BETA else ():
        try:
            ways[other] = peer(other, name)
        except ImportError:
            continue
    return ways


def from_logits(name: str, compile: bool) -> Ways:
    """Implementations of the loss from logits (in h and ht)."""
    loss = kd.DistillationLoss(OBJECTIVES[name](), reduction="none", compile=compile)
    ways: Ways = {"ours": lambda x: loss.from_logits(x["h"], x["ht"], x["labels"]).loss}
    if name in BETA:
        try:
            gkd = PEERS["trl_gkd"]()
        except ImportError:
            return ways
        ways["trl_gkd"] = lambda x: gkd(x["h"][None], x["ht"][None], beta=BETA[name], reduction="none").sum(-1)[0]
    return ways


def measure(
    name: str, dtype: torch.dtype, near: bool, compile: bool, shape: tuple[int, ...], device: str = "cpu"
) -> dict[str, list[float]]:
    """Errors of every implementation of one loss, by name: of the values, of the gradient."""
    objective, found = OBJECTIVES[name](), {}
    for kind, ways in (("hidden", from_hidden(name, compile)), ("logits", from_logits(name, compile))):
        x = two_models(dtype, near, shape, device)
        if kind == "logits":
            x |= {"h": x["h"] @ x["w"].t(), "ht": x["ht"] @ x["wt"].t()}
        exact = {key: tensor.double() for key, tensor in x.items() if key != "labels"}
        keys = ("h", "w") if kind == "hidden" else ("h",)
        for key in keys:
            exact[key].requires_grad_()
            x[key].requires_grad_()
        student, teacher = exact["h"], exact["ht"]
        if kind == "hidden":
            student, teacher = student @ exact["w"].t(), teacher @ exact["wt"].t()
        wanted = reference(objective, student, teacher)
        gradients = torch.autograd.grad(wanted.sum(), tuple(exact[key] for key in keys))
        for way, function in ways.items():
            found[f"{kind}: {way}"] = errors(
                function(x), tuple(x[key] for key in keys), wanted.detach(), tuple(gradients)
            )
    return found


def table(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """One row per loss and implementation: value and gradient error for each dtype and distance."""
    columns = list(next(iter(results.values())))
    lines = [f"| loss | implementation | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, by_column in results.items():
        for way in by_column[columns[0]]:
            cells = (" ; ".join(f"{x:.1e}" for x in by_column[column][way]) for column in columns)
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default=",".join(OBJECTIVES))
    parser.add_argument("--compile", action="store_true", help="measure the compiled loss (one compilation per loss)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/exactness"))
    parser.add_argument("--quick", action="store_true", help="two losses on few tokens")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    losses, shape = (["forward_kl", "amid"], (211, 8, 12, 9)) if args.quick else (args.losses.split(","), SHAPE)
    results = {
        name: {
            f"{label}, {'near' if near else 'far'}": measure(name, dtype, near, args.compile, shape)
            for label, dtype in DTYPES.items()
            for near in (False, True)
        }
        for name in losses
    }
    on, how = machine(args.threads), "compiled" if args.compile else "uncompiled"
    heading = f"# Relative L2 error against float64, of the values ; of the gradient\n\nV {shape[0]}, {how}. {on}.\n"
    write(args.output, {"shape": shape, "machine": on, "results": results}, f"{heading}\n{table(results)}")
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
