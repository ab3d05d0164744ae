"""Check a run for common misconfigurations before it starts: `kd-lightning preflight --config X`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kd_lightning.cli.checks.padding import check_padding
from kd_lightning.cli.checks.preflight_checks import DATA_CHECKS
from kd_lightning.cli.checks.preflight_model_checks import MODEL_CHECKS
from kd_lightning.cli.command_parser import CommandParser, path_argument
from kd_lightning.cli.error_messages import expected, explain
from kd_lightning.cli.prepared_run import Finding, PreparedFit
from kd_lightning.cli.program import run
from kd_lightning.console import progress_bar
from kd_lightning.reporting.redaction import print_message, redact_text

CHECKS = {**DATA_CHECKS, "padding": check_padding, **MODEL_CHECKS}
LAST = ("routing", "places")  # if one of these is refused, the checks after it cannot run


def main(args: Sequence[str]) -> int:
    """Check the run that `fit` with the same arguments would be, and print one line per finding.

    Args:
        args: all `fit` options, and `--json FILE` to write the findings as JSON too.

    Returns:
        1 if a finding is an error, otherwise 0.

    Raises:
        ValueError: the arguments are not those of a run.
    """
    parser = CommandParser(
        prog="kd-lightning preflight",
        description="Check a run before it starts. Accepts all `fit` options, and --json FILE. Status 1 at an error.",
        usage="kd-lightning preflight --config NAME_OR_FILE [--json FILE] [--GROUP.ARGUMENT VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=path_argument, default=None, help="write the findings to this file too")
    given, fit_args = parser.parse_known_args(list(args))
    if given.json is not None:
        _check_json(given.json)
    found = examine(PreparedFit(run(["fit", *fit_args], start=False), "preflight"))
    findings = [Finding(finding.level, finding.check, redact_text(finding.text)) for finding in found]
    for finding in findings:
        print_message(f"{finding.level}: {finding.check}: {finding.text}")
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"preflight: {errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}", file=sys.stderr)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n", encoding="utf-8")
    return int(errors > 0)


def _check_json(path: Path) -> None:
    """Refuse, before the run is built, a file that holds something other than findings or cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path} must be a file in an existing folder")
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            found = None
        if not isinstance(found, list) or not all(isinstance(one, dict) and "check" in one for one in found):
            raise ValueError(f"--json {path} exists and holds no findings: choose another name, or remove it first")


def examine(fit: PreparedFit) -> list[Finding]:
    """All findings on a run that is not started, in the order of `CHECKS`.

    If what a check needs is itself refused, the refusal is its finding; the same refusal is reported once.
    """
    findings: list[Finding] = []
    refused: set[str] = set()
    for name in progress_bar(list(CHECKS), "Preflight"):
        try:
            findings += [Finding(level, name, text) for level, text in CHECKS[name](fit)]
        except Exception as error:
            if not expected(error):
                raise
            if explain(error) not in refused:
                findings.append(Finding("error", name, explain(error)))
                refused.add(explain(error))
            if name in LAST:
                break
    return findings
