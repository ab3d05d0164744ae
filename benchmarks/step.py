"""Cost of a full step: distillation compared with supervised training, and Lightning compared with a bare loop.

    KD step / (SFT step + teacher)   both steps use the same student, batches and engine; the teacher: all logits of the
                                     model, or ("bare") its backbone, and its LM head only on tokens with a label
    Lightning step / bare loop       the same step, data loading included, in a Trainer (with logger, without progress
                                     bar) and in a loop of ten lines

on the bundled models and data with the quickstart's settings. CPU seconds; the measured calls alternate batch by batch,
rounds are interleaved.

    python benchmarks/step.py --steps 60 --rounds 3 --threads 2 --output build/step
    python benchmarks/step.py --quick
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from measuring import machine, spread, write

import kd_lightning as kd

WARM = 5  # steps before the timed ones
Batch = dict[str, torch.Tensor]


def parts(
    batch_size: int, objective: kd.Divergence | None = None
) -> tuple[kd.DistillationModule, kd.InstructionDataModule]:
    """The quickstart's module and data, with forward KL if no objective is given."""
    data = kd.InstructionDataModule(
        train="asset:train", tokenizer="asset:student", batch_size=batch_size, max_length=128
    )
    module = kd.DistillationModule(
        student="asset:student",
        teacher="asset:teacher",
        objective=objective or kd.ForwardKL(),
        reduction="sequence_mean",
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.1),
    )
    return module, data


def loaded(batch_size: int) -> tuple[kd.DistillationModule, kd.InstructionDataModule]:
    """The quickstart's module with loaded models, and its data, for a bare loop."""
    module, data = parts(batch_size)
    data.prepare_data()
    data.setup("fit")
    module.configure_model()
    return module, data


def cpu(call: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def batches(data: kd.InstructionDataModule) -> Iterator[Batch]:
    """Endless training batches."""
    while True:
        yield from data.train_dataloader()


def stepper(module: kd.DistillationModule, loss: kd.DistillationLoss | None) -> Callable[[Batch], None]:
    """One bare step: loss, gradient, clipping, optimizer. A given loss is used without the teacher."""
    model, optimizer = module.model, module.configure_optimizers()
    assert model is not None

    def step(batch: Batch) -> None:
        found = model(batch, module.teacher) if loss is None else model(batch, None, loss)
        optimizer.zero_grad()
        found.mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def kd_beside_sft(steps: int, batch_size: int) -> dict[str, float]:
    """Median CPU seconds of each measured call, over the same batches."""
    module, data = loaded(batch_size)
    teacher: Any = module.teacher
    labels_only = kd.DistillationLoss(kd.ForwardKL(), ce_weight=1.0, reduction="sequence_mean")
    distil, supervise = stepper(module, None), stepper(module, labels_only)
    head = teacher.head

    def bare(batch: Batch, inputs: Batch) -> None:
        label_mask = batch["labels"][:, 1:].reshape(-1) != -100
        hidden = teacher.hidden(inputs)[:, :-1]
        hidden.reshape(-1, hidden.shape[-1])[label_mask] @ head.weight.t()

    seconds: dict[str, list[float]] = {"kd": [], "sft": [], "teacher": [], "teacher_bare": []}
    for i, batch in zip(range(WARM + steps), batches(data), strict=False):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        calls = {
            "kd": functools.partial(distil, batch),
            "sft": functools.partial(supervise, batch),
            "teacher": functools.partial(teacher.logits, inputs),
            "teacher_bare": functools.partial(bare, batch, inputs),
        }
        for name, call in calls.items():
            taken = cpu(call)
            if i >= WARM:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Clock(L.Callback):
    """CPU time at the start of every batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Record the time."""
        self.times.append(time.process_time())


def starts(module: kd.DistillationModule, data: kd.InstructionDataModule, steps: int, every: int) -> list[float]:
    """CPU time at the start of every step of a Trainer that logs to TensorBoard every `every` steps."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as root:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=WARM + steps + 1,
            gradient_clip_val=1.0,
            log_every_n_steps=every,
            logger=TensorBoardLogger(root),
            default_root_dir=root,
            callbacks=[clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
    return clock.times


def lightning_beside_bare(steps: int, batch_size: int) -> dict[str, float]:
    """Median CPU seconds of a step, from one batch's start to the next."""
    by_trainer = starts(*parts(batch_size), steps, every=10)
    module, data = loaded(batch_size)
    step, times = stepper(module, None), []
    for _, batch in zip(range(WARM + steps + 1), batches(data), strict=False):
        times.append(time.process_time())
        step(batch)
    return {
        name: statistics.median(b - a for a, b in zip(marks[WARM:], marks[WARM + 1 :], strict=False))
        for name, marks in (("lightning", by_trainer), ("bare", times))
    }


def table(rounds: list[dict[str, float]]) -> str:
    """The three ratios."""
    rows = (
        ("KD step / (SFT step + teacher)", lambda r: r["kd"] / (r["sft"] + r["teacher"]), 1.2),
        ("KD step / (SFT step + bare teacher)", lambda r: r["kd"] / (r["sft"] + r["teacher_bare"]), 1.2),
        ("Lightning step / bare loop", lambda r: r["lightning"] / r["bare"], 1.2),
    )
    lines = ["| quantity | median [least–most] | limit | |", "|---|---|---|---|"]
    for label, ratio, limit in rows:
        ratios = [ratio(r) for r in rounds]
        met = "" if statistics.median(ratios) <= limit else "missed"
        lines.append(f"| {label} | {spread(ratios)} | {limit:.2f} | {met} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/step"))
    parser.add_argument("--quick", action="store_true", help="a few steps")
    args = parser.parse_args(words)
    if args.quick:
        args.steps, args.rounds, args.batch_size = 3, 1, 4
    torch.set_num_threads(args.threads)
    rounds = [
        kd_beside_sft(args.steps, args.batch_size) | lightning_beside_bare(args.steps, args.batch_size)
        for _ in range(args.rounds)
    ]
    on = machine(args.threads)
    heading = f"# Full steps on the bundled models, batches of {args.batch_size}\n\n"
    heading += f"Medians of {args.steps} steps; {args.rounds} rounds. {on}.\n\n"
    write(args.output, {"machine": on, "threads": args.threads, "rounds": rounds}, heading + table(rounds))
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
