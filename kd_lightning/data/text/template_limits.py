"""Limits on what a chat template may compute: a template is a program of unknown origin, and it runs for every row.

Steps, characters and processor time are counted while a template is rendered. They are counted where Jinja calls out of
the compiled template: loops, calls, filters, operators and output. Arguments are checked before a function that could
return far more than it was given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError

STEPS = 300_000
"""Steps of a rendering, in addition to those for its messages."""
CHARACTERS = 50_000_000
"""Characters of all texts and lists of a rendering, in addition to those for its messages."""
SECONDS = 10.0
"""Processor time of a rendering, in addition to that for its messages."""
PER_CHARACTER = 50  # steps and characters for each character of the messages: templates copy and split them
CHARACTERS_PER_SECOND = 1_000_000
LARGEST_NUMBER = 1_000_000
"""Largest number that a method or a filter gets: widths, counts and sizes."""
MOST_BITS = 10_000
"""Size of integers."""
LONGEST_TEMPLATE = 1_000_000
"""Characters of a template."""

_NUMBER = re.compile(r"\d{6,}")
_CLOCK_EVERY = 256  # steps
# methods of strings, lists and objects whose result is no larger than what they get
SMALL_METHODS = frozenset(
    "startswith endswith strip lstrip rstrip removeprefix removesuffix split rsplit splitlines partition rpartition "
    "find rfind index rindex count lower upper title capitalize swapcase casefold isdigit isalpha isspace isnumeric "
    "isupper islower isalnum get items keys values copy encode".split()
)
# filters that print what they get, or return more than that
PRINTING_FILTERS = frozenset(
    "string tojson pprint join format escape e urlencode xmlattr replace indent center".split()
)
LARGE_FILTERS = frozenset("center indent format batch slice wordwrap tojson xmlattr round urlize".split())


class TemplateLimitError(TemplateError):
    """A template computes more than is allowed."""


class Budget:
    """What is left of the limits of one rendering.

    Args:
        size: characters of the messages and other variables.
    """

    def __init__(self, size: int) -> None:
        self.steps = self.most_steps = STEPS + PER_CHARACTER * size
        self.characters = self.most_characters = CHARACTERS + PER_CHARACTER * size
        self.seconds = SECONDS + size / CHARACTERS_PER_SECOND
        self._end = time.thread_time() + self.seconds

    def step(self, count: int = 1) -> None:
        """Count steps.

        Raises:
            TemplateLimitError: there were too many, or they took too long.
        """
        self.steps -= count
        if self.steps < 0:
            raise TemplateLimitError(f"it does not end within {self.most_steps} steps for one conversation")
        if self.steps % _CLOCK_EVERY == 0 and time.thread_time() > self._end:
            raise TemplateLimitError(f"it does not end within {self.seconds:.0f} s for one conversation")

    def charge(self, count: int) -> None:
        """Count characters, or elements of a list.

        Raises:
            TemplateLimitError: there were too many.
        """
        self.characters -= count
        if self.characters < 0:
            raise TemplateLimitError(f"it writes more than {self.most_characters} characters for one conversation")


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited(variables: Any) -> Iterator[None]:
    """Limit the rendering of a template with these variables."""
    token = _budget.set(Budget(sum(weight(variables))))
    try:
        yield
    finally:
        _budget.reset(token)


def budget() -> Budget:
    """The limits of the current rendering; new ones outside of a rendering."""
    return _budget.get() or Budget(0)


def weight(value: Any, most: float = float("inf")) -> tuple[int, int]:
    """Values inside of a value, at most about `most`, and the characters of their texts."""
    count, characters, waiting = 0, 0, [value]
    while waiting and count <= most:
        inner = waiting.pop()
        count += 1
        if isinstance(inner, (str, bytes)):
            characters += len(inner)
        elif isinstance(inner, Mapping):
            waiting.extend(inner.keys())
            waiting.extend(inner.values())
        elif isinstance(inner, (list, tuple, set, frozenset)):
            waiting.extend(inner)
    return count, characters


def check_printed(value: Any) -> None:
    """Check that a value can be printed: a list may have the same list in it many times."""
    if isinstance(value, (list, tuple, dict)):
        limits = budget()
        count, characters = weight(value, limits.steps)
        limits.charge(characters)
        limits.step(count)


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Check the operands of a binary operator.

    Raises:
        TemplateLimitError: the result would be too large.
    """
    if operator == "+":
        if not isinstance(left, (int, float)):
            budget().charge(_size(left) + _size(right))
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        else:
            budget().charge(_count(left) * _count(right))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right) if abs(left) > 1 else 1)
    elif operator == "%" and isinstance(left, str):
        check_format(left, right if isinstance(right, tuple) else (right,), "%")


def check_method(owner: Any, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Check the arguments of a method of a string, list or object.

    Raises:
        TemplateLimitError: the result may be too large.
    """
    if name in SMALL_METHODS:
        return
    given = (*arguments, *named.values())
    if name in ("format", "format_map"):
        check_format(owner, given, "{")
    elif name == "replace":
        _check_replace(owner, given)
    elif name == "join":
        _check_join(given[0] if given else (), owner)
    else:
        _check_large(owner, given)


def check_filter(name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Check what a filter gets, as `check_method` does."""
    if not arguments:
        return
    value, given = arguments[0], (*arguments[1:], *named.values())
    if name in PRINTING_FILTERS:
        check_printed(value)
    if name == "format":
        check_format(str(value), given, "%")
    elif name == "replace":
        _check_replace(value, given)
    elif name == "join":
        _check_join(value, given[0] if given else "")
    elif name == "tojson" and any(_count(one) > 100 for one in given):
        raise TemplateLimitError("an argument of the filter 'tojson' is larger than 100")
    elif name in LARGE_FILTERS:
        _check_large(value, given)


def check_format(text: Any, given: Iterable[Any], sign: str) -> None:
    """Check a format and its arguments."""
    given = tuple(given)
    if isinstance(text, str):
        if _NUMBER.search(text):
            raise TemplateLimitError("a format has a width of more than 5 digits")
        for one in given:
            _check_number(one)
            check_printed(one)
        budget().charge(len(text) + text.count(sign) * max((_size(one) for one in given), default=0))


def after(value: Any) -> Any:
    """A result, counted; an iterator counts what it yields."""
    if isinstance(value, (str, bytes, list, tuple, dict)):
        budget().charge(len(value))
    elif isinstance(value, Iterator):
        return counted(value)
    return value


def counted(values: Any, characters: int = 0) -> Any:
    """The same elements, each of which is a step.

    Args:
        values: an iterable.
        characters: that each step writes.
    """
    return _Counted(values, characters) if hasattr(type(values), "__len__") else _count_each(values, characters)


class _Counted:
    """An iterable with a length, whose elements are steps."""

    def __init__(self, values: Any, characters: int) -> None:
        self.values, self.characters = values, characters

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return _count_each(self.values, self.characters)


def _count_each(values: Any, characters: int) -> Iterator[Any]:
    limits = budget()
    for value in values:
        limits.step()
        if characters:
            limits.charge(characters)
        yield value


def _size(value: Any) -> int:
    """Length of a text or list; of an object, that of its longest text."""
    if isinstance(value, Mapping):
        return max((len(text) for text in value.values() if isinstance(text, str)), default=0)
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 1


def _count(value: Any) -> int:
    """How often or how much something is written: a number itself, the length of a text."""
    return abs(value) if isinstance(value, int) else max(1, _size(value))


def _check_number(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise TemplateLimitError(f"a method or filter gets a number above {LARGEST_NUMBER}")


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise TemplateLimitError(f"a number has more than {MOST_BITS} bits")


def _check_replace(text: Any, given: tuple[Any, ...]) -> None:
    old, new = (*given, "", "")[:2]
    times = _size(text) // max(1, _size(old)) + 1
    budget().charge(_size(text) + times * _size(new))


def _check_join(values: Any, separator: Any) -> None:
    check_printed(values)
    budget().charge(_size(values) * _size(separator))


def _check_large(value: Any, given: Iterable[Any]) -> None:
    total = max(1, _size(value))
    for one in given:
        _check_number(one)
        total *= max(1, _count(one))
    if total > budget().characters:
        raise TemplateLimitError(f"it writes more than {budget().most_characters} characters for one conversation")
