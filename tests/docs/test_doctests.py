"""Every public name has an example in its docstring, and all examples of the reference are right."""

from __future__ import annotations

import ast
import doctest
import gc
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_lightning
from kd_lightning.subclasses import concrete_subclasses
from locations import ROOT

NAMES = sorted(set(kd_lightning.__all__) - {"__version__"})
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
OTHERS = sorted(
    name
    for page in PAGES
    for name in re.findall(r"^::: kd_lightning\.([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if name not in NAMES
)
"""Documented functions and classes that are imported from their modules."""


@pytest.fixture(scope="module", autouse=True)
def no_classes() -> Iterator[None]:
    """Classes that examples define must not outlive them: they would be listed as subclasses."""
    yield
    gc.collect()
    assert not [leaf for leaf in concrete_subclasses(torch.nn.Module) if leaf.__module__ == "__main__"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example writes is left in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def found(path: str) -> Any:
    """The object that a page documents."""
    *modules, name = path.split(".")
    holder = importlib.import_module(".".join(("kd_lightning", *modules))) if modules else kd_lightning
    return getattr(holder, name) if hasattr(holder, name) else importlib.import_module(f"kd_lightning.{path}")


def text_under(name: str) -> str:
    """The text under a public name that is neither class nor function, such as `Weight`."""
    stub = ast.parse((ROOT / "kd_lightning" / "__init__.pyi").read_text(encoding="utf-8"))
    module = next(node.module for node in stub.body if isinstance(node, ast.ImportFrom) and node.names[0].name == name)
    body = ast.parse(inspect.getsource(importlib.import_module(str(module)))).body
    here = next(i for i, node in enumerate(body) if isinstance(node, ast.Assign) and ast.unparse(node.targets) == name)
    text = body[here + 1]
    assert isinstance(text, ast.Expr)
    return str(ast.literal_eval(text.value))


def examples(path: str) -> list[doctest.DocTest]:
    """The examples of a name: of its own docstring first, then of its methods, or of the functions of a module."""
    known = found(path)
    if inspect.isclass(known) or inspect.isroutine(known) or inspect.ismodule(known):
        return sorted(doctest.DocTestFinder().find(known, path, globs={}), key=lambda test: len(test.name))
    return [doctest.DocTestParser().get_doctest(text_under(path), {}, path, None, None)]


def check(tests: list[doctest.DocTest]) -> None:
    """Run examples, each docstring by itself."""
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in tests:
        test.globs["__name__"] = "__main__"
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_examples_that_are_right(name: str) -> None:
    tests = examples(name)
    assert tests[0].examples, f"{name} needs `Examples:` in its docstring, a few lines that start with >>>"
    check(tests)


@pytest.mark.parametrize("name", OTHERS)
def test_the_examples_of_other_documented_names_are_right(name: str) -> None:
    check(examples(name))


def test_no_example_is_skipped() -> None:
    for path in sorted((ROOT / "kd_lightning").rglob("*.py")):
        assert "doctest: +SKIP" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize(
    ("text", "message"),
    [("Forward KL.", "ForwardKL needs `Examples:`"), (">>> 1 + 1\n3\n", r"Expected:\s+3\s+Got:\s+2")],
    ids=["no example", "a wrong example"],
)
def test_what_is_missing_or_wrong_fails(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_lightning.ForwardKL, "__doc__", text)
    with pytest.raises(AssertionError, match=message):
        test_a_public_name_has_examples_that_are_right("ForwardKL")
