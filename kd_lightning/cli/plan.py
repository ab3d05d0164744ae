"""Estimate the memory of a run on each of many ranks: `kd-lightning plan --config X --world_size N`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace

from kd_lightning.cli.command_parser import CommandParser
from kd_lightning.cli.program import run
from kd_lightning.cli.trainer_cli import TrainerCLI
from kd_lightning.memory_plan.figures import Plan
from kd_lightning.memory_plan.simulate import plan
from kd_lightning.memory_plan.tracker import format_bytes
from kd_lightning.reporting.redaction import print_message
from kd_lightning.strategies import FSDP2Strategy

FLAGS = "--world_size N [--memory 80GiB] [--json FILE]"
UNITS = {
    "": 1,
    **{
        f"{letter}{kind}": base**power
        for kind, base in (("B", 1000), ("iB", 1024))
        for power, letter in enumerate("KMGTP", 1)
    },
}
FULL = 0.9  # share of a device's memory; the rest is for fragmentation and communication buffers


def main(args: Sequence[str]) -> int:
    """Estimate the memory, on each of `--world_size` ranks, of the run that `fit` with the same arguments would be.

    No weights, GPUs or other processes are needed: the models have shapes and no values. `--trainer.accelerator cpu`
    plans for CPUs, anything else for GPUs. Each row of a batch is assumed to have `max_length` tokens, all with labels.

    Args:
        args: all `fit` options, and the options of this command.

    Returns:
        0, also if it does not fit.

    Raises:
        ValueError: an argument is out of its range, a size does not divide the number of ranks, or a model cannot be
            built.
    """
    parser = CommandParser(
        prog="kd-lightning plan",
        description="Estimate the memory of a run without its hardware. Accepts all `fit` options, and these.",
        usage=f"kd-lightning plan --config NAME_OR_FILE {FLAGS} [--GROUP.ARGUMENT VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, required=True, help="number of ranks, over all machines")
    parser.add_argument("--memory", default=None, help="memory of a device, such as 80GiB: report whether it is enough")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file too")
    given, fit_args = parser.parse_known_args(list(args))
    if given.world_size < 1:
        raise ValueError(f"--world_size must be at least 1, got {given.world_size}")
    memory = None if given.memory is None else size(given.memory)
    for_cpu: list[bool] = []

    def use_ranks(config: Namespace) -> None:
        for_cpu.append(config.trainer.accelerator == "cpu")
        for name, value in {"accelerator": "cpu", "devices": given.world_size, "num_nodes": 1, "logger": False}.items():
            config.trainer[name] = value

    cli = run(["fit", *fit_args], start=False, change=use_ranks)
    found = plan(cli.model, cli.datamodule, cli.trainer, gpu=not for_cpu[0])
    for line in [*table(found), *verdict(found, memory, cli)]:
        print_message(line)
    if given.json is not None:
        figures = {**found.to_json(), "memory": memory, "fits": None if memory is None else fits(found.peak, memory)}
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def size(text: str) -> int:
    """Bytes of a text such as `80GiB`, `24 GB` or `1.5TiB`.

    Raises:
        ValueError: it is no such text, or 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in {*UNITS, "B"} or not float(found[1]):
        raise ValueError(f"--memory must be a number and a unit, such as 80GiB or 24GB, got {text!r}")
    return int(float(found[1]) * UNITS.get(found[2], 1))


def fits(peak: int, memory: int) -> bool:
    """Whether this many bytes of device memory are enough, with 10 % headroom."""
    return peak <= FULL * memory


def table(plan: Plan) -> list[str]:
    """The figures as lines."""
    rows, length = plan.batch
    lines = [
        f"{plan.strategy} on {plan.ranks} rank{'s' * (plan.ranks != 1)}; each micro-batch of a rank has "
        f"{rows} row{'s' * (rows != 1)} of {length} tokens, all with labels",
        f"{'':14}{'student':>12}{'teacher':>12}",
    ]
    student, teacher = asdict(plan.student), asdict(plan.teacher)
    for name in ("parameters", "gradients", "optimizer", "buffers"):
        lines.append(f"{name:14}{format_bytes(student[name]):>12}{format_bytes(teacher[name]):>12}")
    more = {"activations": plan.activations, "gathered": plan.gathered, "tiles": plan.tiles}
    more |= {"buckets": plan.buckets} if plan.buckets else {}
    lines += [f"{name:14}{format_bytes(value):>12}" for name, value in more.items()]
    lines.append(f"{'peak':14}{format_bytes(plan.peak):>12}")
    if plan.host:
        lines.append(f"{'host memory':14}{format_bytes(plan.host):>12}")
    for name, numbers in plan.collectives.items():
        lines.append(f"{name:14}{format_bytes(numbers['bytes']):>12}   {numbers['count']} times per step")
    return lines + [f"note: {note}" for note in plan.notes]


def verdict(plan: Plan, memory: int | None, cli: TrainerCLI) -> list[str]:
    """Whether it fits, and otherwise what would reduce the memory."""
    if memory is None:
        return []
    share = f"{format_bytes(plan.peak)} of {format_bytes(memory)} ({plan.peak / memory:.0%})"
    if fits(plan.peak, memory):
        return [f"fits: {share} at the peak"]
    headroom = "; 10 % headroom is reserved for fragmentation and communication buffers" if plan.peak <= memory else ""
    return [f"does not fit: {share} at the peak{headroom}", *(f"try {text}" for text in changes(plan, cli))]


def changes(plan: Plan, cli: TrainerCLI) -> list[str]:
    """Up to four changes that reduce the largest components, the largest first."""
    module, strategy, precision = cli.model, cli.trainer.strategy, cli.trainer.precision_plugin.precision
    sharded, several = strategy if isinstance(strategy, FSDP2Strategy) else None, plan.ranks > 1
    fsdp2 = "--trainer.strategy FSDP2Strategy --trainer.strategy."
    spread = "--trainer.strategy fsdp2: each rank holds a shard of student and teacher"
    more = "a larger --world_size" if sharded or several else f"a larger --world_size with {spread}"
    recompute = f"{fsdp2}activation_checkpointing" if sharded else "--model.gradient_checkpointing"
    held = plan.student.parameters + plan.student.gradients + plan.student.optimizer + plan.buckets
    batch = plan.batch[0] > 1
    options = [
        (held + plan.teacher.parameters, not sharded and several, spread),
        (held, module.lora is None, "--model.lora.r 16: gradients and optimizer state of the adapters only"),
        (held, True, more),
        (held, sharded and not sharded.cpu_offload, f"{fsdp2}cpu_offload true: shards in host memory"),
        (plan.teacher.parameters, True, "--model.teacher OffloadedTeacher: its layers in host memory"),
        (
            plan.teacher.parameters,
            module.responses is None and not module.teacher_cache,
            "--model.teacher_cache true: its outputs are cached before the first step, and it is unloaded",
        ),
        (
            plan.activations,
            not module.student_source.gradient_checkpointing and not (sharded and sharded.activation_checkpointing),
            f"{recompute} true: recompute activations in backward",
        ),
        (plan.activations, batch, f"--data.batch_size below {plan.batch[0]}, with --trainer.accumulate_grad_batches"),
        (plan.activations, True, f"--data.max_length below {plan.batch[1]}"),
        (plan.activations + plan.gathered, precision == "32-true", "--trainer.precision bf16-mixed"),
        (
            plan.gathered,
            sharded and sharded.tensor_parallel_size == 1 and several,
            f"{fsdp2}tensor_parallel_size 2: each rank computes its share of the logits",
        ),
    ]
    return [text for size, possible, text in sorted(options, key=lambda option: -option[0]) if possible and size][:4]
