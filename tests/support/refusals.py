"""Run the program and expect a refusal in one line."""

from __future__ import annotations

import pytest

from kd_lightning.cli.program import main


def refused(words: list[str], said: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run, and hold the rule: status not 0, one line, no traceback, every word of `said` in it."""
    capfd.readouterr()
    code = main(words)
    err = capfd.readouterr().err
    assert code != 0, "the run went through"
    assert "Traceback" not in err
    line = next(line for line in err.splitlines() if line.startswith("kd-lightning: error: "))
    assert err.rstrip().endswith(line)
    for word in said:
        assert word in line, f"{word!r} is not in: {line}"
    return line
