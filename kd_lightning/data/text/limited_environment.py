"""The Jinja environment of chat templates, with limits on what a template computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, nodes, pass_context
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

from kd_lightning.data.text import template_limits as limits
from kd_lightning.models.hf_adapter import chat_template_environment, replace_template_compiler


@contextmanager
def limited_rendering(variables: Any, now: datetime | None = None) -> Iterator[None]:
    """While it is entered, transformers renders chat templates with limits.

    Args:
        variables: messages, tools and other variables: longer ones allow more.
        now: the date that the template writes; None: today's.
    """
    _plain_environment()  # while its compiler is that of transformers
    with replace_template_compiler(functools.partial(_compiled, now=now)), limits.limited(variables):
        yield


@functools.lru_cache(maxsize=32)
def _compiled(chat_template: str, now: datetime | None) -> Template:
    if len(chat_template) > limits.LONGEST_TEMPLATE:
        raise limits.TemplateLimitError(
            f"it has {len(chat_template)} characters, more than {limits.LONGEST_TEMPLATE}: pass a shorter template"
        )
    return _environment(now).from_string(chat_template)


@functools.cache
def _plain_environment() -> Environment:
    return chat_template_environment()


def _environment(now: datetime | None) -> LimitedEnvironment:
    """An environment like that of transformers."""
    plain = _plain_environment()
    extensions = [type(extension) for extension in plain.extensions.values()]
    found = LimitedEnvironment(trim_blocks=plain.trim_blocks, lstrip_blocks=plain.lstrip_blocks, extensions=extensions)
    found.globals.update(plain.globals)
    found.globals.pop("lipsum", None)
    if now is not None:
        found.globals["strftime_now"] = now.strftime
    found.filters.update({name: _limited_filter(name, function) for name, function in plain.filters.items()})
    return found


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose loops, calls, filters, operators and output are counted."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False, finalize=_written)  # constants would be computed while compiling

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of a binary operator."""
        limits.check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a call: of a macro, a method or a function."""
        limits.budget().step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, list, tuple, dict, int)):
            limits.check_method(owner, method.__name__, args, kwargs)
        elif isinstance(__obj, LoopContext):  # of a recursive loop
            args = (limits.counted(args[0]), *args[1:]) if args else args
        elif __obj is __self.globals.get("raise_exception"):
            limits.check_printed(list(args))
        return limits.after(super().call(__context, __obj, *args, **kwargs))

    def concatenate(self, *values: Any) -> str:
        """The values of `a ~ b` as one text."""
        for value in values:
            limits.check_printed(value)
            limits.after(value)
        return "".join(map(str, values))

    def loop(self, values: Any, characters: int) -> Any:
        """What a loop runs over."""
        return limits.counted(values, characters)

    def part(self, value: Any) -> Any:
        """A part of a text or list; `call` counts it."""
        return value


@pass_context
def _written(context: Context, value: Any) -> Any:
    """What `{{ value }}` writes."""
    limits.check_printed(value)
    if isinstance(value, str):
        limits.budget().charge(len(value))
    return value


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 0 if _PassArg.from_obj(function) is None else 1

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        limits.budget().step()
        limits.check_filter(name, args[skipped:], kwargs)
        return limits.after(function(*args, **kwargs))

    return limited


class _Instrument(NodeTransformer):
    """Calls the environment's methods in loops, in concatenations and for parts of texts."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop counts its steps, and the text of the template that each step writes."""
        self.generic_visit(node)
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _call("loop", [node.iter, nodes.Const(written)], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        """`a ~ b` is a call."""
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """`a[1:]` copies what it takes."""
        self.generic_visit(node)
        return _call("part", [node], node) if isinstance(node.arg, nodes.Slice) else node


def _call(method: str, arguments: Sequence[nodes.Node], node: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None, lineno=node.lineno)
    if node.environment is not None:
        call.set_environment(node.environment)
    return call
