"""What a run takes on each of many ranks, without them: `kd-lightning plan --config X --world_size N`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lightning.cli.command_parser import CommandParser
from kd_lightning.cli.program import run
from kd_lightning.memory_plan.tracker import format_bytes

FLAGS = "--world_size N [--memory 80GiB] [--json FILE]"
UNITS = {
    "": 1,
    **{
        f"{letter}{kind}": base**power
        for kind, base in (("B", 1000), ("iB", 1024))
        for power, letter in enumerate("KMGTP", 1)
    },
}
FULL = 0.9  # of a card: the rest is for what is not counted, fragments and the buffers of exchanges
MODELS = ("student", "teacher")


def main(args: Sequence[str]) -> int:
    """Say what the run that `fit` with the same words would be takes on each of `--world_size` ranks.

    No weights, GPUs or other processes are needed: the models are built as shapes. `--trainer.accelerator cpu` plans
    for CPUs, anything else for GPUs. Every row of a batch is taken to be `max_length` tokens long, all of them counted.

    Args:
        args: every word that `fit` takes, and the command's own.

    Returns:
        0, also where it does not fit.

    Raises:
        ValueError: an argument is out of its range, a size does not divide the number of ranks, or a model cannot be
            built.
    """
    own = CommandParser(
        prog="kd-lightning plan",
        description="Plan a run without its hardware: every argument of `fit`, and these.",
        usage=f"kd-lightning plan --config NAME_OR_FILE {FLAGS} [--GROUP.ARGUMENT VALUE ...]",
        allow_abbrev=False,
    )
    own.add_argument("--world_size", type=int, required=True, help="ranks of the run, over all machines")
    own.add_argument("--memory", default=None, help="of one card, such as 80GiB: say whether it is enough")
    own.add_argument("--json", type=Path, default=None, help="write the figures to this file too")
    given, words = own.parse_known_args(list(args))
    if given.world_size < 1:
        raise ValueError(f"--world_size must be at least 1, got {given.world_size}")
    memory = None if given.memory is None else size(given.memory)
    on_cpu = []

    def on_ranks(config: Any) -> None:
        on_cpu.append(config.trainer.accelerator == "cpu")
        for name, value in {"accelerator": "cpu", "devices": given.world_size, "num_nodes": 1, "logger": False}.items():
            config.trainer[name] = value

    cli = run(["fit", *words], start=False, change=on_ranks)
    from kd_lightning.memory_plan.simulate import plan

    found = plan(cli.model, cli.datamodule, cli.trainer, gpu=not on_cpu[0])
    for line in [*table(found), *verdict(found, memory, cli)]:
        print(line)
    if given.json is not None:
        figures = {**found.to_json(), "memory": memory, "fits": None if memory is None else fits(found.peak, memory)}
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def size(text: str) -> int:
    """Bytes that a text such as `80GiB`, `24 GB` or `1.5TiB` means.

    Raises:
        ValueError: it is no such text, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in {*UNITS, "B"} or not float(found[1]):
        raise ValueError(f"--memory must be a number and a unit, such as 80GiB or 24GB, got {text!r}")
    return int(float(found[1]) * UNITS.get(found[2], 1))


def fits(peak: int, memory: int) -> bool:
    """Whether a card of so many bytes is enough, with a tenth left for what is not counted."""
    return peak <= FULL * memory


def table(plan: Any) -> list[str]:
    """The figures as lines."""
    rows, length = plan.batch
    lines = [
        f"{plan.strategy} on {plan.ranks} rank{'s' * (plan.ranks != 1)}; on each, in a micro-batch, "
        f"{rows} row{'s' * (rows != 1)} of {length} tokens, all counted",
        f"{'':14}{'student':>12}{'teacher':>12}",
    ]
    for name in ("parameters", "gradients", "optimizer", "buffers"):
        lines.append(
            f"{name:14}" + "".join(f"{format_bytes(getattr(getattr(plan, role), name)):>12}" for role in MODELS)
        )
    more = {"activations": plan.activations, "gathered": plan.gathered, "tiles": plan.tiles}
    more |= {"buckets": plan.buckets} if plan.buckets else {}
    lines += [f"{name:14}{format_bytes(value):>12}" for name, value in more.items()]
    lines.append(f"{'peak':14}{format_bytes(plan.peak):>12}")
    if plan.host:
        lines.append(f"{'in the host':14}{format_bytes(plan.host):>12}")
    for name, numbers in plan.collectives.items():
        lines.append(f"{name:14}{format_bytes(numbers['bytes']):>12}   {numbers['count']} times a step")
    return lines + [f"note: {note}" for note in plan.notes]


def verdict(plan: Any, memory: int | None, cli: Any) -> list[str]:
    """Whether it fits, and what would make it smaller."""
    if memory is None:
        return []
    share = f"{format_bytes(plan.peak)} of {format_bytes(memory)} ({plan.peak / memory:.0%})"
    if fits(plan.peak, memory):
        return [f"fits: {share} at the peak"]
    why = "a tenth must stay free for fragments and buffers of exchanges" if plan.peak <= memory else "too little"
    return [f"does not fit: {share} at the peak; {why}", *(f"try {word}" for word in changes(plan, cli))]


def changes(plan: Any, cli: Any) -> list[str]:
    """What makes the largest parts smaller, the largest first."""
    module, strategy, precision = cli.model, cli.trainer.strategy, cli.trainer.precision_plugin.precision
    sharded, several = plan.strategy == "fsdp2", plan.ranks > 1
    fsdp2 = "--trainer.strategy FSDP2Strategy --trainer.strategy."
    spread = "--trainer.strategy fsdp2: every rank holds its part of student and teacher"
    more = "a larger --world_size" if sharded or several else f"a larger --world_size with {spread}"
    held = plan.student.parameters + plan.student.gradients + plan.student.optimizer + plan.buckets
    batch = plan.batch[0] > 1
    ways = [
        (held + plan.teacher.parameters, not sharded and several, spread),
        (held, module.lora is None, "--model.lora.r 16: gradients and optimizer state of adapters alone"),
        (held, True, more),
        (held, sharded and not strategy.cpu_offload, f"{fsdp2}cpu_offload true: shards in the host's memory"),
        (plan.teacher.parameters, True, "--model.teacher OffloadedTeacher: its layers in the host's memory"),
        (
            plan.teacher.parameters,
            module.responses is None and not module.teacher_cache,
            "--model.teacher_cache true: it is asked once, before the first step, and leaves",
        ),
        (
            plan.activations,
            sharded and not strategy.activation_checkpointing,
            f"{fsdp2}activation_checkpointing true: layers are computed again in backward",
        ),
        (plan.activations, batch, f"--data.batch_size below {plan.batch[0]}, with --trainer.accumulate_grad_batches"),
        (plan.activations, True, f"--data.max_length below {plan.batch[1]}"),
        (plan.activations + plan.gathered, precision == "32-true", "--trainer.precision bf16-mixed"),
        (
            plan.gathered,
            sharded and strategy.tensor_parallel_size == 1 and several,
            f"{fsdp2}tensor_parallel_size 2: each rank makes its part of the logits",
        ),
    ]
    return [way for size, possible, way in sorted(ways, key=lambda way: -way[0]) if possible and size][:4]
