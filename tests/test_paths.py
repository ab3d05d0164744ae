"""`~` and environment variables in paths."""

from pathlib import Path

import pytest

from kd_lightning.assets import resolve
from kd_lightning.cli.configs import expand_paths, shipped_config
from kd_lightning.paths import expand_path


@pytest.mark.parametrize("expand", [expand_path, resolve])
def test_home_and_variables_are_expanded(expand: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(expand)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", "~/models")
    monkeypatch.chdir(tmp_path)
    assert expand("~/a/b") == f"{tmp_path}/a/b"
    assert expand("${HOME}/a$HOME") == f"{tmp_path}/a{tmp_path}"
    assert expand("$MODELS/x") == f"{tmp_path}/models/x"
    for unchanged in ("org/name", "./a//b", "a~b", "", "C:x"):
        assert expand(unchanged) == unchanged
    with pytest.raises(ValueError, match=r"\$NOT_SET/x: the environment variable NOT_SET is not set"):
        expand("$NOT_SET/x")
    (tmp_path / "$NOT_SET").mkdir()
    assert expand("$NOT_SET") == "$NOT_SET"


def test_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jsonargparse import Namespace

    monkeypatch.setenv("HOME", str(tmp_path))
    logger = Namespace(class_path="CSVLogger", init_args=Namespace(save_dir="~/logs"))
    config = Namespace(
        trainer=Namespace(default_root_dir="~/root", logger=[logger]),
        checkpoint=Namespace(dirpath="$HOME/c"),
        baseline=None,
    )
    expand_paths(config)
    assert config.trainer.default_root_dir == f"{tmp_path}/root"
    assert config.checkpoint.dirpath == f"{tmp_path}/c"
    assert config.trainer.logger[0].init_args.save_dir == f"{tmp_path}/logs"
    (tmp_path / "my.yaml").touch()
    assert shipped_config("~/my.yaml") == f"{tmp_path}/my.yaml"
    config.trainer.default_root_dir = "${GONE}/root"
    with pytest.raises(ValueError, match=r"--trainer\.default_root_dir \$\{GONE\}/root: the environment variable GONE"):
        expand_paths(config)
