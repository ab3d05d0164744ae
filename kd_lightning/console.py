"""Terminal output: progress bars, log levels, and warnings that are silenced."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # importing this module must stay cheap, and tqdm reads the environment when it is imported
    from lightning.pytorch import Trainer

T = TypeVar("T")


def progress_bar(items: Iterable[T], title: str, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """The items, with a bar of how many have passed: plain lines in a log, nothing below two seconds there.

    Args:
        items: what is gone through.
        title: what stands before the bar.
        total: how many; None: as many as `len(items)` says.
        shown: whether there is a bar.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(items, desc=title, total=total, disable=not shown, leave=False)


def enable_info_logging() -> None:
    """Let the package's lines of information be seen, once, where nobody has set up logging."""
    logger = logging.getLogger("kd_lightning")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)


def progress_bar_enabled(trainer: Trainer) -> bool:
    """Whether a run shows how far it is, and on this rank."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


# How tqdm, and so `datasets`, shows how far it is in a file: from two seconds on, a line every ten.
PLAIN_BARS = {
    "DELAY": "2",
    "MININTERVAL": "10",
    "BAR_FORMAT": "{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}\n",
}


def silence_known_warnings() -> None:
    """Silence what a user can do nothing about; each line says why."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # calls that Lightning makes, not the user
    for pattern in (
        r".*does not have many workers.*",  # the bundled data is tokenised once and needs none
        r".*module\(s\) in eval mode at the start of training.*",  # dropout-free parts of Hugging Face models
        r".*Checkpoint directory .* exists and is not empty.*",  # a resume writes where it wrote
        r".*LightningCLI's args parameter is intended to run from within Python.*",  # names of configs are expanded
        r".*You have overridden `.*` in .* but have passed.*",
        r".*is smaller than the logging interval.*",  # short runs and tests
        r".*callbacks used to create the checkpoint need to be provided.*",  # those of `fit` do nothing in `test`
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: (
            not any(word in record.getMessage() for word in ("TPU available", "HPU available", "💡", "GPU available"))
        )
    )


def use_plain_progress_bars() -> None:
    """Lines in the place of bars where nobody watches; tqdm reads this when it is first imported."""
    if not sys.stderr.isatty():
        for name, text in PLAIN_BARS.items():
            os.environ.setdefault(f"TQDM_{name}", text)
