"""Which package may import which, what an import costs, and that every public name exists and is documented."""

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

# From the bottom up. A file or package imports only what stands on lower lines, and nothing else on its own line.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("paths",),
    ("constants", "console", "atomic_io", "folder_lock", "subclasses", "seeding", "assets"),
    ("reporting",),
    ("functional", "schedules"),
    ("divergences", "assistants", "label_losses", "token_weights"),
    ("objectives", "engine"),
    ("losses", "metrics", "models", "distributed"),
    ("teachers", "data", "strategies", "serving"),
    ("rollout", "training", "generation"),
    ("callbacks",),
    ("module",),
    ("memory_plan", "integrations"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MATHEMATICS = (
    "functional",
    "schedules",
    "divergences",
    "assistants",
    "label_losses",
    "token_weights",
    "objectives",
    "engine",
    "losses",
)
HEAVY = {"lightning", "transformers", "torchmetrics", "datasets", "jsonargparse", "tensorboard"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name[0] != "_")
LARGEST = {"files at the top level": 17, "files in a package": 14, "lines in a file": 320, "lines in a function": 60}


def room(path: Path) -> str:
    """The file at the top level, or the package, that a path belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function; names of this package in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path) -> set[str]:
    """Files and packages at the top level of this package that a file imports."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("kd_lightning.")}
    return found & LEVEL.keys() - {room(path)}


def modules(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    known = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES}
    return {name for name in imports(path) if name in known}


def test_every_file_stands_in_a_layer() -> None:
    assert {room(path) for path in FILES} == LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    wrong = {name for name in own(path) if LEVEL[name] >= LEVEL[room(path)]}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(wrong))}"


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): modules(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_imports_torch_alone(name: str) -> None:
    for path in FILES:
        if room(path) == name:
            foreign = {module.split(".")[0] for module in imports(path)} - {"torch", "kd_lightning"}
            assert not foreign - sys.stdlib_module_names, path.name


def test_metrics_need_torchmetrics_but_no_trainer() -> None:
    foreign = {module.split(".")[0] for path in FILES if room(path) == "metrics" for module in imports(path)}
    assert foreign - {"torch", "kd_lightning"} - sys.stdlib_module_names == {"torchmetrics"}


def test_reports_know_no_lightning() -> None:
    foreign = {module.split(".")[0] for path in FILES if room(path) == "reporting" for module in imports(path)}
    assert not foreign & {"lightning", "transformers"}


def test_the_package_is_small_enough_to_be_read() -> None:
    sizes = {"files at the top level": len(list(PACKAGE.glob("*.py")))}
    folders = {path.parent for path in FILES} - {PACKAGE}
    sizes["files in a package"] = max(len(list(folder.glob("*.py"))) for folder in folders)
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    sizes["lines in a file"] = max(text.count("\n") for text in texts.values())
    functions = (
        node
        for text in texts.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    sizes["lines in a function"] = max((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    assert {name: size for name, size in sizes.items() if size > LARGEST[name]} == {}


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
    assert not loaded_after(statement) & HEAVY


def test_the_compiler_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, torch\nbefore = set(sys.modules)\nfrom kd_lightning import DistillationLoss\n"
    code += "print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in done.stdout.split())


@pytest.mark.parametrize("name", kd_lightning.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    found = getattr(kd_lightning, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__doc__ and found.__doc__.strip()
        assert found.__module__.startswith("kd_lightning.")
        if inspect.isclass(found):
            for method, value in vars(found).items():
                if inspect.isfunction(value) and not method.startswith("_") and method != "forward":
                    assert inspect.getdoc(getattr(found, method)), f"{name}.{method} has no docstring"


@pytest.mark.parametrize(
    "path",
    "functional schedules divergences assistants objectives label_losses token_weights engine losses metrics teachers "
    "strategies rollout module callbacks cli data".split(),
)
def test_public_paths_stay(path: str) -> None:
    code = f"import kd_lightning.{path}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ForwardKl'"):
        _ = kd_lightning.ForwardKl
    assert "ForwardKL" in dir(kd_lightning)


def test_the_stub_lists_every_public_name_once_with_the_module_that_defines_it() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    listed = [
        (node.module, alias.name, alias.asname)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert all(name == asname for _, name, asname in listed)
    assert len(listed) == len({name for _, name, _ in listed}) == len(kd_lightning.__all__) - 1
    for module, name, _ in listed:
        defined = getattr(kd_lightning, name)
        if inspect.isclass(defined) or inspect.isfunction(defined):
            assert defined.__module__ == module
