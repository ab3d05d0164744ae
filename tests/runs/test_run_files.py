"""The files of a run: checkpoints that were damaged, leftovers of killed runs, a second run in the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import runs
from kd_lightning.cli.program import main


def test_a_resume_from_a_damaged_checkpoint_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    words = [*runs.little(root, steps=2), "--data.train", str(runs.little_data(tmp_path))]
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    last = root / "checkpoints" / "last.ckpt"
    assert last.with_name("last.ckpt.sha256").read_text().endswith("  last.ckpt\n")
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    capfd.readouterr()
    for command in ([*words, "--ckpt_path", "last"], ["preflight", *words[1:], "--ckpt_path", str(last)]):
        assert main(command) == 1
        out, err = capfd.readouterr()
        lines = [line for line in (out + err).splitlines() if "last.ckpt is damaged: it is not what was saved" in line]
        assert len(lines) == 1 and "Traceback" not in out + err
    last.with_name("last.ckpt.sha256").unlink()
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    assert main([*words, "--ckpt_path", "last"]) == 0
