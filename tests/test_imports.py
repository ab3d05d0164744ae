"""Who may import whom, what an import costs, and that every public name is there and explained."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kd_lightning

PACKAGE = Path(kd_lightning.__file__).parent

# Downward: a file imports only what stands to the left of it.
ORDER = (
    "functional",
    "schedules",
    "divergences",
    "assistants",
    "objectives",
    "outcomes",
    "label_losses",
    "compiling",
    "token_loss",
    "engine",
    "counted",
    "gaps",
    "losses",
)
ABOVE_THE_LINE = (*ORDER, "metrics")
OURS = {"torch", "kd_lightning"}


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at the top or inside a function; names of this package in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "kd_lightning")


def own(path: Path) -> set[str]:
    """Files of this package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("kd_lightning.")}


@pytest.mark.parametrize("name", ORDER)
def test_the_mathematics_imports_torch_and_downward_only(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    foreign = {module.split(".")[0] for module in imports(path)} - OURS - sys.stdlib_module_names
    assert not foreign
    assert own(path) <= set(ORDER[: ORDER.index(name)])


def test_metrics_need_torchmetrics_but_no_trainer() -> None:
    path = PACKAGE / "metrics.py"
    foreign = {module.split(".")[0] for module in imports(path)} - OURS - sys.stdlib_module_names
    assert foreign == {"torchmetrics"}
    assert own(path) <= set(ORDER)


def test_data_knows_neither_loss_nor_module() -> None:
    paths = list((PACKAGE / "data").glob("*.py"))
    assert paths
    for path in paths:
        assert not own(path) & {*ABOVE_THE_LINE, "module", "callbacks", "cli"}, path.name


def test_nothing_below_the_line_is_reached_for_from_above() -> None:
    below = {path.stem for path in PACKAGE.glob("*.py")} - set(ABOVE_THE_LINE) - {"__init__", "__main__"}
    for name in ABOVE_THE_LINE:
        assert not own(PACKAGE / f"{name}.py") & below


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kd_lightning",
        "from kd_lightning import ForwardKL, TAID, AMiD, distillation_loss, fused_distillation_loss, DistillationLoss",
    ],
    ids=["the package", "the losses"],
)
def test_the_losses_load_neither_lightning_nor_transformers(statement: str) -> None:
    heavy = {"lightning", "transformers", "torchmetrics", "datasets", "jsonargparse", "tensorboard"}
    assert not loaded_after(statement) & heavy


def test_the_compiler_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, torch\nbefore = set(sys.modules)\nfrom kd_lightning import DistillationLoss\n"
    code += "print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in done.stdout.split())


@pytest.mark.parametrize("name", kd_lightning.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    found = getattr(kd_lightning, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__doc__ and found.__doc__.strip()
        assert found.__module__.startswith("kd_lightning.")
        if inspect.isclass(found):
            for method, value in vars(found).items():
                if inspect.isfunction(value) and not method.startswith("_") and method != "forward":
                    assert inspect.getdoc(getattr(found, method)), f"{name}.{method} has no docstring"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ForwardKl'"):
        _ = kd_lightning.ForwardKl
    assert "ForwardKL" in dir(kd_lightning)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (node.module, alias.asname)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname
    }
    assert seen == {(f"kd_lightning.{home}", name) for name, home in kd_lightning._HOMES.items()}
