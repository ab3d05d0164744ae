"""Terminal output: progress bars, log levels, and silenced warnings."""

from __future__ import annotations

import codecs
import io
import locale
import logging
import os
import re
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # importing this module must be cheap, and tqdm reads the environment on import
    from lightning.pytorch import Trainer

T = TypeVar("T")

# Characters that act on a terminal, reorder the text around them, or hide: control characters except tab and newline,
# direction marks, line separators, tags, and half surrogate pairs, which no file can hold.
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
PLAIN = {"…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "·": "*", "‖": "||", "≥": ">=", "≤": "<=", "±": "+-"}
PLAIN |= {"√": "sqrt", "→": "->", "‘": "'", "’": "'", "“": '"', "”": '"', "█": "#", "α": "alpha", "β": "beta"}


def printable(text: str) -> str:
    """A text in which characters that act on a terminal, or hide, are written as escapes: ESC as backslash, x1b."""
    return ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def use_any_console_encoding() -> None:
    """Print on a console that is not UTF-8 what it can show, instead of an error; files are UTF-8 in any locale."""
    codecs.register_error("kd_lightning", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kd_lightning")
    if locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        try:  # other packages open files with the encoding of the locale
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        except locale.Error:
            pass


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Similar characters that the console's encoding has, or an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    out = []
    for letter in error.object[error.start : error.end]:
        plain = PLAIN.get(letter) or unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
        out.append(plain or letter.encode("ascii", "backslashreplace").decode())
    return "".join(out), error.end


def progress_bar(items: Iterable[T], title: str, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Iterate with a progress bar. In a log it prints plain lines, and none in the first two seconds.

    Args:
        items: any iterable.
        title: of the bar.
        total: number of items; None: `len(items)`.
        shown: whether to show the bar.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(items, desc=title, total=total, disable=not shown, leave=False, **terminal_bar())


def terminal_bar() -> dict[str, Any]:
    """Arguments that give every bar of tqdm in a terminal the same style; none without one.

    All bars must be written to one stream: only then do they find their lines below each other.
    """
    stream = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
    if stream is None:
        return {}
    return {"file": stream, "dynamic_ncols": True, "bar_format": BAR_FORMAT, "mininterval": 0.1, "delay": 0}


def enable_info_logging() -> None:
    """Show the package's info messages, unless logging is configured already."""
    logger = logging.getLogger("kd_lightning")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)


def progress_bar_enabled(trainer: Trainer) -> bool:
    """Whether the run shows progress bars, and on this rank."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


BAR_FORMAT = "{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

# Progress bars of tqdm (and of `datasets`) in a log: after two seconds, one line every ten seconds.
PLAIN_BARS = {
    "DELAY": "2",
    "MININTERVAL": "10",
    "BAR_FORMAT": "{desc}: {n_fmt} of {total_fmt}, {remaining} left{postfix}\n",
}


def silence_known_warnings() -> None:
    """Silence warnings that a user cannot act on; a comment next to each gives the reason."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # raised by calls of Lightning
    for pattern in (
        r".*does not have many workers.*",  # the bundled data is tokenized once and needs none
        r".*module\(s\) in eval mode at the start of training.*",  # dropout-free parts of Hugging Face models
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run writes to the same folder
        r".*LightningCLI's args parameter is intended to run from within Python.*",  # config names are expanded
        r".*You have overridden `.*` in .* but have passed.*",
        r".*is smaller than the logging interval.*",  # short runs and tests
        r".*callbacks used to create the checkpoint need to be provided.*",  # not those of `fit` in `test`
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: (
            not any(word in record.getMessage() for word in ("TPU available", "HPU available", "💡", "GPU available"))
        )
    )


class WriterErrors:
    """A `threading.excepthook` for errors of TensorBoard's writer thread, which the logger raises again later.

    Without it the thread prints a traceback, and the error that is raised later does not name the file.

    Attributes:
        errors: the errors so far; one in the last write is never raised again.
    """

    def __init__(self) -> None:
        self.errors: list[OSError] = []
        self._previous = threading.excepthook

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        """Keep an error of the writer thread, with the name of its file; pass on any other."""
        if not isinstance(args.exc_value, OSError) or type(args.thread).__name__ != "_AsyncWriterThread":
            self._previous(args)
            return
        file = getattr(getattr(args.thread, "_record_writer", None), "_writer", None)  # no public access
        if args.exc_value.filename is None and file is not None:
            args.exc_value.filename = os.fsdecode(file.filename)
        self.errors.append(args.exc_value)


@contextmanager
def quiet_writer_threads() -> Iterator[None]:
    """Within the block, an error of TensorBoard's writer thread is one line: raised later, or printed at the end."""
    hook = WriterErrors()
    before, threading.excepthook = threading.excepthook, hook
    try:
        yield
        for error in hook.errors:
            print(f"kd-lightning: warning: the curves are incomplete: {error}", file=sys.stderr)
    finally:
        threading.excepthook = before


def use_plain_progress_bars() -> None:
    """Print lines instead of bars if stderr is not a terminal. Call it before tqdm is imported, which reads this."""
    if not sys.stderr.isatty():
        for name, text in PLAIN_BARS.items():
            os.environ.setdefault(f"TQDM_{name}", text)
