"""Rendering of chat templates: what is refused, and the templates of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from kd_lightning.data.text.limited_environment import limited_rendering
from kd_lightning.data.text.template_limits import LONGEST_TEMPLATE, TemplateLimitError

DATE = "%Y-%m-%d"
# a template is a program: it can fail with any error of Python's arithmetic, memory and compiler
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
    SyntaxError,
)


def today() -> str:
    """The date as YYYY-MM-DD."""
    return datetime.now().strftime(DATE)


def date_of(text: str) -> datetime:
    """The date of a text YYYY-MM-DD.

    Raises:
        ValueError: it is another text.
    """
    try:
        return datetime.strptime(text, DATE)
    except (ValueError, TypeError):
        raise ValueError(f"date must be a date such as 2026-01-31, got {text!r}") from None


class EndlessTemplateError(ValueError):
    """A template computes more than is allowed: it is refused, and not tried with other messages."""


@contextmanager
def refusals(variables: Any, now: datetime | None = None) -> Iterator[None]:
    """While it is entered, templates are rendered with limits, and their errors are one line.

    Args:
        variables: what the template is rendered with.
        now: the date that it writes; None: today's.

    Raises:
        EndlessTemplateError: the template computes too much.
        ValueError: it refuses the messages.
    """
    try:
        with limited_rendering(variables, now):
            yield
    except TemplateLimitError as error:
        raise EndlessTemplateError(
            f"the chat template computes too much: {error}: pass another chat_template"
        ) from None
    except REFUSALS as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the chat template refuses this row: {text}") from None


def read_template(template: str | None, name: str = "chat_template") -> str | None:
    """A chat template from a file; a Jinja template is returned as it is.

    Raises:
        ValueError: it is neither, or the file is too large or not UTF-8.
    """
    if template is None or "{" in template:
        return template
    path = Path(template)
    try:
        if not path.is_file():
            raise OSError
        if path.stat().st_size > 4 * LONGEST_TEMPLATE:
            raise ValueError(
                f"{name} {template!r} has {path.stat().st_size} bytes: it must be a file of at most "
                f"{LONGEST_TEMPLATE} characters"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
        raise ValueError(f"{name} {template!r} is not UTF-8 ({byte}): save the file as UTF-8") from None
    except OSError:
        raise ValueError(f"{name} must be a Jinja template or a file that holds one, got {template!r}") from None
