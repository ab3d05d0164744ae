"""Wheel and sdist: their files, and that the wheel works in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from locations import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the sdist, and the sdist, built from this tree."""
    out = tmp_path_factory.mktemp("dist")
    run(ROOT, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def site(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    run(target, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(built[0]))
    return target


def run(folder: Path, *args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package_and_every_config(built: tuple[Path, Path]) -> None:
    files = wheel_files(built[0])
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kd_lightning").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {f"kd_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) >= 12
    assert package | configs <= files
    assert {"kd_lightning/py.typed", "kd_lightning/assets/train.jsonl"} <= files
    rest = {name for name in files - package - configs if not name.split("/")[0].endswith(".dist-info")}
    assert not rest, "only the package is installed"


def test_the_wheel_declares_its_license_and_its_program(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        header = Parser().parsestr(archive.read(metadata).decode())
        programs = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        assert metadata.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert header["License-Expression"] == "Apache-2.0"
    assert header["Requires-Python"] == ">=3.11"
    assert "kd-lightning = kd_lightning.cli:main" in programs


def test_the_sdist_holds_tests_configs_and_scripts(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tests/conftest.py",
        "configs/quickstart.yaml",
        ".ci/run",
    } <= files


def test_the_installed_package_is_complete_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    program = """
import pathlib, sys
import kd_lightning
from kd_lightning import assets
from kd_lightning.cli import configs
site = pathlib.Path(sys.argv[1])
package = pathlib.Path(kd_lightning.__file__).parent
assert package == site / "kd_lightning", package
assert (package / "py.typed").is_file()
for name in ("teacher", "student", "train", "validation", "test"):
    path = pathlib.Path(assets.resolve(f"asset:{name}"))
    assert site in path.parents and path.exists(), path
assert pathlib.Path(configs.shipped_config("quickstart")) == package / "configs" / "quickstart.yaml"
"""
    # -P and -I would hide the folder too: it goes first in the path, before an editable installation of this tree.
    run(tmp_path, "-c", program, str(site), PYTHONPATH=str(site))


def test_the_installed_program_finds_a_shipped_config_by_name(site: Path, tmp_path: Path) -> None:
    out = run(tmp_path, "-m", "kd_lightning", "fit", "--config", "taid", "--print_config", PYTHONPATH=str(site))
    assert "TAID" in out
    assert "asset:teacher" in out
    assert not list(tmp_path.iterdir()), "printing a configuration writes nothing"
