"""A file or folder is complete, or it is the previous one."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors import SafetensorError

from kd_lightning.atomic_io import atomic_file, atomic_folder
from kd_lightning.distributed.checkpoint_io import REQUIRED_KEYS, AtomicCheckpointIO, install_checkpoint_io
from locations import ROOT


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.txt"
    with atomic_file(path) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_file(path) as part:
        part.write_text("half of the sec")
        raise RuntimeError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = tmp_path / "student"
    for text in ("first", "second"):
        with atomic_folder(path) as part:
            (part / "weights").write_text(text)
    with pytest.raises(RuntimeError), atomic_folder(path) as part:
        (part / "weights").write_text("third")
        raise RuntimeError
    assert (path / "weights").read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    (tmp_path / ".student.old").mkdir()
    (tmp_path / ".student.old" / "weights").write_text("first")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "student") as part:
        (part / "weights").write_text("second")
        raise RuntimeError
    assert (tmp_path / "student" / "weights").read_text() == "first"


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({**dict.fromkeys(REQUIRED_KEYS), "weight": torch.ones(2)}, path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"weight": torch.zeros(2)}, path)
    assert torch.equal(io.load_checkpoint(path)["weight"], torch.ones(2))


def test_a_checkpoint_with_anything_but_tensors_and_plain_values_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"module": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match=r"foreign\.ckpt is not a checkpoint that can be read safely"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


def test_a_checkpoint_io_that_the_user_has_chosen_is_kept() -> None:
    class Custom(TorchCheckpointIO):
        pass

    strategy = SingleDeviceStrategy()
    install_checkpoint_io(strategy)
    assert type(strategy.checkpoint_io) is AtomicCheckpointIO
    chosen = Custom()
    strategy.checkpoint_io = chosen
    install_checkpoint_io(strategy)
    assert strategy.checkpoint_io is chosen


def test_without_the_program_an_explicit_weights_only_false_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({**dict.fromkeys(REQUIRED_KEYS), "module": torch.nn.Linear(1, 1)}, path)
    strategy = SingleDeviceStrategy()
    install_checkpoint_io(strategy)
    assert isinstance(strategy.load_checkpoint(path, weights_only=False)["module"], torch.nn.Linear)
    for weights_only in (None, True):
        with pytest.raises(ValueError, match="is not a checkpoint that can be read safely"):
            strategy.load_checkpoint(path, weights_only=weights_only)


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EDQUOT, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["of the system", "of Rust", "of another writer"])
def test_a_limit_is_reported_with_the_path_whatever_the_writer_raises(number: int, kind: str, tmp_path: Path) -> None:
    texts = {"of Rust": f"I/O error: Some text (os error {number})", "of another writer": f"[Errno {number}] Some text"}
    for write in (atomic_file, atomic_folder):
        with pytest.raises(OSError, match="student") as found, write(tmp_path / "student"):
            raise OSError(number, "Some text") if kind == "of the system" else SafetensorError(texts[kind])
        assert found.value.errno == number and str(tmp_path / "student") in str(found.value)
    with pytest.raises(RuntimeError, match="bug"), atomic_folder(tmp_path / "student"):
        raise RuntimeError("a bug")


EXPORT = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from kd_lightning.atomic_io import atomic_folder, exhausted
from kd_lightning.distributed.sharded_checkpoint import write_rank_file
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    with atomic_folder(sys.argv[1]) as part:
        (part / "config.json").write_text("{}")
        save_file({"weight": torch.ones(1_000_000)}, part / "model.safetensors")
except OSError as error:
    print(error)
folder = Path(sys.argv[2])
try:
    write_rank_file({"weight": torch.ones(1_000_000)}, folder, 0)
except (OSError, RuntimeError) as error:
    print(exhausted(error, folder))
"""


def test_a_file_size_limit_is_reported_for_folders_and_rank_files(tmp_path: Path) -> None:
    (tmp_path / "rank").mkdir()
    words = [sys.executable, "-c", EXPORT, str(tmp_path / "student"), str(tmp_path / "rank")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    export, rank = done.stdout.splitlines()
    assert "File too large" in export and str(tmp_path / "student") in export, done.stderr
    assert int(rank) == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["rank"]


LIMITED = """
import resource, sys, torch
from kd_lightning.distributed.checkpoint_io import AtomicCheckpointIO
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(1_000_000)}, sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_file_size_limit_is_one_line_as_a_full_disk(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "last.ckpt")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "File too large" in done.stdout and "last.ckpt" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
