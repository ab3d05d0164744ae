"""Cost of a step by source of responses, relative to the work that cannot be avoided.

    on-policy step / (step + generate)   the student responds to a batch and is trained on it, relative to the same step
                                         and one bare `model.generate` of as many tokens
    contrastive / two plain steps        pairs with fixed skews (DistiLLM-2), relative to SKL on the teacher's halves
                                         and SRKL on the student's halves, each padded separately
    skew of each response                pairs with `ResponseGap` on both sides, relative to pairs with fixed skews:
                                         both LM heads are read again

on the bundled models and data, forward and backward without the optimizer. CPU seconds; the variants take turns, batch
by batch.

    python benchmarks/responses.py --turns 30 --output build/responses

writes OUTPUT.json and OUTPUT.md. (on_policy.py evaluates the resulting students.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import machine, spread, write

import kd_lightning as kd
from kd_lightning.data.sources import read_rows
from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import RolloutContext
from kd_lightning.rollout.batches import prompts

WARM = 3  # turns before the timed ones
RATIOS = {
    "on-policy step / (step + generate)": (("respond", "step"), ("generate", "step"), 1.10),
    "contrastive / two plain steps": (("contrastive",), ("teacher's half", "student's half"), 1.05),
    "skew of each response / fixed": (("gap",), ("contrastive",), None),
}
"""For each ratio: the terms of the numerator, the terms of the denominator, and the limit."""
Batch = dict[str, torch.Tensor]


def cpu(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """CPU seconds of a call, and its return value."""
    began = time.process_time()
    found = call(*args)
    return time.process_time() - began, found


def losses() -> dict[str, kd.DistillationLoss]:
    """A loss for each variant."""

    def pairs(first: float | kd.ResponseGap, second: float | kd.ResponseGap) -> kd.Contrastive:
        return kd.Contrastive(kd.SkewKL(first), kd.SkewReverseKL(second))

    objectives = {
        "step": kd.ForwardKL(),
        "contrastive": pairs(0.1, 0.1),
        "teacher's half": kd.SkewKL(0.1),
        "student's half": kd.SkewReverseKL(0.1),
        "gap": pairs(kd.ResponseGap(0.1), kd.ResponseGap(0.1, side="student")),
    }
    return {name: kd.DistillationLoss(objective, reduction="sequence_mean") for name, objective in objectives.items()}


def half(batch: Batch, source: int) -> Batch:
    """The rows of one side, without unnecessary padding."""
    chosen = batch["source"] == source
    width = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: x[chosen][:, :width] if x.ndim == 2 else x[chosen] for name, x in batch.items()}


def on_policy_batches(size: int) -> Iterator[Batch]:
    """Endless batches of instructions."""
    data = kd.InstructionDataModule("asset:train", tokenizer="asset:student", batch_size=size, max_length=128)
    data.setup("fit")
    while True:
        yield from data.train_dataloader()


def paired_batches(size: int) -> Iterator[Batch]:
    """Endless batches of pairs: the answer of a row, and the answer of the next row instead of the student's."""
    rows = [row for _, row in read_rows("asset:train", "train")][:1001]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            for one, other in itertools.pairwise(rows):
                pair = {"teacher_response": one["output"], "student_response": other["output"]}
                lines.write(json.dumps({name: one[name] for name in ("instruction", "input")} | pair) + "\n")
        data = kd.ContrastiveDataModule(str(path), tokenizer="asset:student", batch_size=size // 2, max_length=128)
        data.setup("fit")
        while True:
            yield from data.train_dataloader()


def measure(turns: int, size: int, new: int) -> list[dict[str, float]]:
    """CPU seconds of every variant in each turn.

    Args:
        turns: Number of turns.
        size: Rows per batch; half as many pairs.
        new: Maximum number of new tokens per response.
    """
    module = kd.DistillationModule("asset:student", "asset:teacher")
    module.configure_model()
    model: Any = module.model
    trained = losses()

    def step(name: str, batch: Batch) -> None:
        model.zero_grad()
        model(batch, module.teacher, trained[name]).mean.backward()

    def bare(ids: torch.Tensor, mask: torch.Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        model.student.eval()
        with torch.no_grad():
            model.student.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0
            )
        model.student.train()

    found = []
    for turn, batch, paired in zip(range(WARM + turns), on_policy_batches(size), paired_batches(size), strict=False):
        author, seconds = RolloutContext(model, module.teacher, seed=turn), {}
        seconds["respond"], written = cpu(author.respond, batch, Sampling(new))
        seconds["generate"], _ = cpu(bare, *prompts(batch), author.number("write", 0, 0))
        batches = {"step": written, "contrastive": paired, "gap": paired}
        batches |= {"teacher's half": half(paired, 1), "student's half": half(paired, 2)}
        for name, one in batches.items():
            seconds[name], _ = cpu(step, name, one)
        found.append(seconds)
    return found[WARM:]


def table(turns: list[dict[str, float]]) -> str:
    """Every ratio over the turns."""
    lines = ["| ratio | median [least–most] | limit |  |", "|---|---|---|---|"]
    for name, (above, below, limit) in RATIOS.items():
        found = sorted(sum(turn[x] for x in above) / sum(turn[x] for x in below) for turn in turns)
        middle = found[len(found) // 2]
        cells = ("", "") if limit is None else (f"{limit:.2f}", "missed" if middle > limit else "")
        lines.append(f"| {name} | {spread(found)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--new", type=int, default=32, help="maximum number of new tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("build/responses"))
    parser.add_argument("--quick", action="store_true", help="check that it runs, on a few rows")
    words = parser.parse_args(args)
    if words.quick:
        words.turns, words.batch_size, words.new = 1, 4, 4
    torch.set_num_threads(words.threads)
    turns = measure(words.turns, words.batch_size, words.new)
    settings = {name: getattr(words, name) for name in ("turns", "batch_size", "new", "threads")}
    record = {"machine": machine(words.threads), "settings": settings, "turns": turns}
    head = f"batches of {words.batch_size} rows, at most {words.new} new tokens; {words.turns} turns"
    write(words.output, record, f"{record['machine']}\n\n{head}\n\n{table(turns)}")


if __name__ == "__main__":
    main()
