"""Cache the teacher's outputs for every row of the data: `kd-lightning cache --config X --output DIR`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from kd_lightning.cli.command_parser import CommandParser, path_argument
from kd_lightning.cli.prepared_run import PreparedFit
from kd_lightning.cli.program import run
from kd_lightning.distributed.signals import Terminated, exit_status
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.reporting.redaction import print_message
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.training.student import StudentWithLoss

FLAGS = "--output DIR [--kind hidden|top_k] [--k 64] [--dtype bfloat16|float32] [--shard_mib 256]"


def main(args: Sequence[str]) -> int:
    """Write the teacher cache of the run that `fit` with the same arguments would be. An interrupted cache is resumed.

    Ctrl-C (status 130) and SIGTERM (status 143) finish the present batch.

    `--kind hidden` keeps hidden states: exact for every loss, up to the rounding of `--dtype` (bfloat16: a relative
    error of at most 2⁻⁹). `--kind top_k` keeps the `--k` most probable tokens, always including the label, and the
    total probability of all others.

    Args:
        args: all `fit` options, and the options of this command.

    Raises:
        ValueError: an argument is out of its range, there is no teacher, responses are generated during the run, or
            the folder holds another cache.
    """
    parser = CommandParser(
        prog="kd-lightning cache",
        description="Cache the teacher's outputs for the data. Accepts all `fit` options, and these.",
        usage=f"kd-lightning cache --config NAME_OR_FILE {FLAGS} [--GROUP.ARGUMENT VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder of the cache; an incomplete one is resumed"
    )
    parser.add_argument("--kind", default="hidden", help="hidden: hidden states; top_k: the most probable tokens")
    parser.add_argument("--k", type=int, default=64, help="number of tokens of each distribution (top_k)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--shard_mib", type=int, default=256, help="size of a file: the work lost if interrupted")
    given, fit_args = parser.parse_known_args(list(args))
    if given.shard_mib < 1:
        raise ValueError(f"--shard_mib must be at least 1, got {given.shard_mib}")
    fit = PreparedFit(run(["fit", *fit_args], start=False), "cache")
    student, teacher = load_models(fit)
    start = time.perf_counter()
    try:
        with forward_context(fit.trainer):
            cached = fill_cache(
                given.output,
                teacher,
                fit.datamodule,
                student.vocabulary,
                kind=given.kind,
                dtype=given.dtype,
                k=given.k,
                shard_bytes=given.shard_mib << 20,
                bar=fit.config.trainer.enable_progress_bar is not False,
            )
    except (KeyboardInterrupt, Terminated) as end:
        print_message(f"interrupted: run the same command again to resume {given.output}", sys.stderr)
        return exit_status(end)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in given.output.glob("shard-*"))
    print_message(
        f"{given.output}: {cached.tokens} tokens of {', '.join(cached.data)}, {size / max(cached.tokens or 1, 1):.0f} "
        f"bytes per token, {seconds:.1f} s",
        sys.stderr,
    )
    return 0


def load_models(fit: PreparedFit) -> tuple[StudentWithLoss, Teacher]:
    """Student, and teacher on the run's device, after the rows are tokenized.

    Raises:
        ValueError: there is no teacher to cache, or no responses before the run.
    """
    teacher = fit.module.teacher
    if teacher is None:
        raise ValueError("cache: model.teacher is null: pass --model.teacher")
    if isinstance(teacher, CachedTeacher):
        raise ValueError(f"cache: model.teacher is already a cache ({teacher.path}): pass the teacher itself")
    teacher.check_cacheable()
    generators = [fit.module.responses, *fit.regenerations]
    if names := [type(generator).__name__ for generator in generators if generator is not None]:
        raise ValueError(
            f"cache: {names[0]} generates responses during the run, which cannot be cached before it: leave it out, or "
            "cache the responses that `kd-lightning generate` writes to a file"
        )
    fit.datamodule.train_dataloader()  # joins pairs of responses
    fit.module.configure_model()  # not `fit.model`: the student is not needed on the device
    assert fit.module.model is not None
    teacher.load(fit.device)
    return fit.module.model, teacher
