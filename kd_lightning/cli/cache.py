"""What the teacher says about the data, written down once: `kd-lightning cache --config X --output DIR`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.command_parser import CommandParser
from kd_lightning.cli.program import run
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher

FLAGS = "--output DIR [--kind hidden|top_k] [--k 64] [--dtype bfloat16|float32] [--shard_mib 256]"


def main(args: Sequence[str]) -> int:
    """Write the teacher cache of the run that `fit` with the same words would be; interrupted, it goes on.

    `--kind hidden` keeps hidden states, exact for every loss up to the rounding of `--dtype` (bfloat16: 2⁻⁹ of each
    number). `--kind top_k` keeps the `--k` most probable tokens, the label among them, and the mass of all others.

    Args:
        args: every word that `fit` takes, and the command's own.

    Raises:
        ValueError: an argument is out of its range, there is no teacher, the responses are written in the run, or the
            folder is another cache's.
    """
    own = CommandParser(
        prog="kd-lightning cache",
        description="Write down what the teacher says about the data: every argument of `fit`, and these.",
        usage=f"kd-lightning cache --config NAME_OR_FILE {FLAGS} [--GROUP.ARGUMENT VALUE ...]",
        allow_abbrev=False,
    )
    own.add_argument("--output", type=Path, required=True, help="the folder; one that is there is gone on with")
    own.add_argument("--kind", default="hidden", help="hidden: hidden states; top_k: the likeliest tokens and the rest")
    own.add_argument("--k", type=int, default=64, help="tokens of each distribution (top_k)")
    own.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    own.add_argument("--shard_mib", type=int, default=256, help="size of one file, and what a kill costs at most")
    given, words = own.parse_known_args(list(args))
    if given.shard_mib < 1:
        raise ValueError(f"--shard_mib must be at least 1, got {given.shard_mib}")
    cli = run(["fit", *words], start=False)
    module, datamodule = prepared(cli)
    start = time.perf_counter()
    with cli.trainer.precision_plugin.forward_context():
        kept = fill_cache(
            given.output,
            module.teacher,
            datamodule,
            module.model.vocabulary,
            kind=given.kind,
            dtype=given.dtype,
            k=given.k,
            shard_bytes=given.shard_mib << 20,
            bar=cli.config_init["fit"].trainer.enable_progress_bar is not False,
        )
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in given.output.glob("shard-*"))
    print(
        f"{given.output}: {kept.tokens} tokens of {', '.join(kept.data)}, {size / max(kept.tokens or 1, 1):.0f} bytes "
        f"each, {seconds:.1f} s",
        file=sys.stderr,
    )
    return 0


def prepared(cli: Any) -> tuple[Any, Any]:
    """Module with its models, data module with its rows.

    Args:
        cli: what `cli.run(words, start=False)` returns.

    Raises:
        ValueError: there is no teacher to listen to, or nothing that is known before the run.
    """
    module, datamodule = cli.model, cli.datamodule
    if module.teacher is None:
        raise ValueError("cache: model.teacher is null, and there is nothing to write down")
    if isinstance(module.teacher, CachedTeacher):
        raise ValueError(f"cache: model.teacher is a cache already ({module.teacher.path})")
    writers = [module.responses, *(part for part in cli.trainer.callbacks if isinstance(part, Regeneration))]
    if names := [type(writer).__name__ for writer in writers if writer is not None]:
        raise ValueError(
            f"cache: {names[0]} writes what is trained on while the run goes on, and a cache made before holds none of "
            "it; what `kd-lightning generate` wrote to a file can be cached"
        )
    datamodule.use_tokenizer_of(module.tokenizer_name)
    datamodule.setup("fit")
    if datamodule.sources["test"]:
        datamodule.setup("test")
    datamodule.train_dataloader()  # pairs of responses are joined here
    module.configure_model()
    module.teacher.load(cli.trainer.strategy.root_device)
    return module, datamodule
