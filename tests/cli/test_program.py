"""The program: what its import costs, and its help."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kd_lightning.cli.command_parser import OTHER_COMMANDS, TRAINER_COMMANDS
from kd_lightning.cli.program import main
from locations import ROOT


@pytest.mark.parametrize("module", ["kd_lightning.cli", "kd_lightning.cli.program", "kd_lightning.cli.configs"])
def test_its_import_is_cheap(module: str) -> None:
    code = f"import sys, {module}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "lightning", "transformers", "jsonargparse", "tqdm", "yaml"} & set(done.stdout.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, description in {**TRAINER_COMMANDS, **OTHER_COMMANDS}.items():
        assert name in text
        assert description in text


@pytest.mark.parametrize("mine", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "3"}])
def test_threads_wait_asleep_unless_the_user_says_how_they_wait(mine: dict[str, str]) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    code = (
        "import os, sys\n"
        "from kd_lightning.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "assert main(['no-such-command']) == 1\n"
        f"print(*[os.environ.get(name) for name in {names}])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in names} | mine
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = mine or {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    assert shown.stdout.split() == [str(expected.get(name)) for name in names]


def test_help_opens_with_what_most_runs_set_and_lists_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    opening = text.splitlines()[:40]
    for name in ("config", "model.student", "model.teacher", "model.objective", "model.optimizer.lr", "data.train"):
        assert any(f"--{name} " in line for line in opening), name
    for name in ("data.max_length", "data.group_by_length", "data.chat_template", "data.num_workers"):
        assert f"--{name}\n" in text
    assert text.index("--model.student MODEL") < text.index("--data.max_length") < text.index("--print_config")
    assert "(default: true)" in text
