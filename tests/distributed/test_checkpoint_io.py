"""Checkpoints: the newest complete one is found, and damaged or foreign ones are refused by name."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning.cli.configs import checkpoint_path
from kd_lightning.distributed import checkpoint_io
from kd_lightning.distributed.checkpoint_io import AtomicCheckpointIO, open_checkpoint
from kd_lightning.distributed.checksum import checksum_path
from kd_lightning.distributed.sharded_checkpoint import META, write_rank_file


class RunsCode:
    """An object that would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("true",)


def content(step: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "state_dict": {"weight": torch.arange(1000.0) + step},
        "loops": {},
        "global_step": step,
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [],
        **more,
    }


def save(path: Path, step: int, seconds: float, **more: Any) -> Path:
    """A checkpoint with this time of writing."""
    AtomicCheckpointIO().save_checkpoint(content(step, **more), path)
    os.utime(path, (seconds, seconds))
    return path


def test_last_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    last = save(folder / "last.ckpt", 5, seconds=100)
    newer = save(folder / "epoch=0-step=7.ckpt", 7, seconds=200)
    (folder / ".epoch=0-step=9.ckpt.123.part").write_bytes(newer.read_bytes()[:700])
    save(folder / "best.ckpt", 9, seconds=400)
    assert checkpoint_path("last", tmp_path / "checkpoints") == str(newer)
    os.utime(last, (200, 200))  # the same time: both hold the same step
    assert checkpoint_path("last", tmp_path / "checkpoints") == str(last)
    for path in (last, newer):
        path.unlink()
    with pytest.raises(ValueError, match=r"--ckpt_path last: .*checkpoints has no \*\.ckpt to resume from"):
        checkpoint_path("last", tmp_path / "checkpoints")


def test_checkpoints_with_weights_only_are_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = save(folder / "last.ckpt", 5, seconds=200)
    checkpoint = content()
    del checkpoint["optimizer_states"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "weights.ckpt")
    assert checkpoint_path("last", tmp_path / "checkpoints") == str(path)
    assert checkpoint_path("last", tmp_path / "checkpoints", resume=False) == str(folder / "weights.ckpt")
    path.unlink()
    with pytest.raises(ValueError, match=r"weights\.ckpt holds weights only"):
        checkpoint_path("last", tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["last.ckpt", "epoch=1-step=2.ckpt"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_a_flipped_byte_is_refused(where: float, name: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, 3, seconds=1)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0x20
    path.write_bytes(data)
    for read in (AtomicCheckpointIO().load_checkpoint, open_checkpoint):
        with pytest.raises(ValueError, match=f"{name} is damaged: it is not what was saved"):
            read(path)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("step: 3\n"),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "a number": lambda path: torch.save(3, path),
    "other keys": lambda path: torch.save({"weight": torch.ones(2)}, path),
    "other kinds": lambda path: torch.save(content(state_dict=3), path),
    "no step": lambda path: torch.save(content(global_step="three"), path),
    "code": lambda path: torch.save({**content(), "callbacks": RunsCode()}, path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({**content(), "callbacks": RunsCode()})),
    "half": lambda path: path.write_bytes(_bytes(path)[:4000]),
    "the end": lambda path: path.write_bytes(_bytes(path)[-4000:]),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
}


def _bytes(path: Path) -> bytes:
    torch.save(content(), path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_or_damaged_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "last.ckpt"
    FOREIGN[kind](path)
    for name in ("last", str(path)):
        with pytest.raises(ValueError, match=r"last\.ckpt") as refusal:
            checkpoint_path(name, tmp_path / "checkpoints")
        text = str(refusal.value)
        assert "\n" not in text and "weights_only" not in text and "trust" not in text, text
        assert len(text) < 400
    if kind == "code":
        assert "system), which can run code" in text


def test_the_refusal_of_the_newest_names_the_one_before(tmp_path: Path) -> None:
    older = save(tmp_path / "checkpoints" / "epoch=0-step=4.ckpt", 4, seconds=10)
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"last\.ckpt .*the file is empty \(the one before it is ") as refusal:
        checkpoint_path("last", tmp_path / "checkpoints")
    assert str(older) in str(refusal.value)


def test_a_checkpoint_without_a_checksum_loads_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "last.ckpt", 3, seconds=1)
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 3
    assert not caplog.records
    checksum_path(path).unlink()
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 3
    assert "last.ckpt has no checksum (last.ckpt.sha256): loaded without checking it" in caplog.text


@pytest.mark.parametrize("function", ["sha256", "announce", "record"])
def test_killed_anywhere_while_replacing_what_is_there_loads(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "last.ckpt", 3, seconds=1)

    def kill(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_io, function, kill)
        AtomicCheckpointIO().save_checkpoint(content(4), path)
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == (4 if function == "record" else 3)
    save(path, 5, seconds=2)
    assert len(checksum_path(path).read_text().splitlines()) == 1


def test_a_removed_checkpoint_leaves_no_checksum_and_a_link_uses_that_of_its_target(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 3, seconds=1)
    link = tmp_path / "last.ckpt"
    link.symlink_to("a.ckpt")
    assert checksum_path(link) == checksum_path(path)
    assert AtomicCheckpointIO().load_checkpoint(link)["global_step"] == 3
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == [link]


def test_a_damaged_file_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    write_rank_file(content(), folder, rank=0)
    assert open_checkpoint(folder)["global_step"] == 3
    data = bytearray((folder / META).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / META).write_bytes(data)
    with pytest.raises(ValueError, match=rf"last\.ckpt/{META} is damaged"):
        open_checkpoint(folder)
