"""What would waste a run, found before it: `kd-lightning preflight --config X`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_lightning.cli.command_parser import CommandParser
from kd_lightning.cli.error_messages import expected, explain
from kd_lightning.cli.preflight_checks import CHECKS, LAST
from kd_lightning.cli.prepared_run import Finding, Setup
from kd_lightning.cli.program import run
from kd_lightning.console import progress_bar


def main(args: Sequence[str]) -> int:
    """Check the run that `fit` with the same words would be; one line a finding.

    Args:
        args: every word that `fit` takes, and `--json FILE` for the findings as JSON too.

    Returns:
        1 where a finding is an error, otherwise 0.

    Raises:
        ValueError: the words are not those of a run at all.
    """
    own = CommandParser(
        prog="kd-lightning preflight",
        description="Check a run before it starts: every argument of `fit`, and --json FILE. Status 1 at an error.",
        usage="kd-lightning preflight --config NAME_OR_FILE [--json FILE] [--GROUP.ARGUMENT VALUE ...]",
        allow_abbrev=False,
    )
    own.add_argument("--json", type=Path, default=None, help="write the findings to this file too")
    given, words = own.parse_known_args(list(args))
    if given.json is not None:
        _check_json(given.json)
    findings = examine(run(["fit", *words], start=False))
    for finding in findings:
        print(f"{finding.level}: {finding.check}: {finding.text}")
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"preflight: {errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}", file=sys.stderr)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n", encoding="utf-8")
    return int(errors > 0)


def _check_json(path: Path) -> None:
    """Refuse a file that holds something else than findings, or that cannot be written, before anything is done."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path} must be a file in a folder that is there")
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            found = None
        if not isinstance(found, list) or not all(isinstance(one, dict) and "check" in one for one in found):
            raise ValueError(f"--json {path} exists and holds no findings: choose another name, or remove it first")


def examine(cli: Any) -> list[Finding]:
    """All findings on what `fit` would train with, in the order of `checks.CHECKS`.

    A check that cannot be made, because what it needs is itself refused, gives that refusal as its finding, once.

    Args:
        cli: what `cli.run(words, start=False)` returns.
    """
    setup, findings, refused = Setup(cli.model, cli.datamodule, cli.trainer, cli.config_init["fit"]), [], set()
    for check in progress_bar(CHECKS, "Preflight"):
        try:
            findings += [Finding(level, check.__name__, text) for level, text in check(setup)]
        except Exception as error:
            if not expected(error):
                raise
            if explain(error) not in refused:
                findings.append(Finding("error", check.__name__, explain(error)))
                refused.add(explain(error))
            if check in LAST:
                break
    return findings
