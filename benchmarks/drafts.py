"""The student as the draft model of its teacher: acceptance and accepted length before and after short fits.

Every run trains the bundled student with a shipped config for `--steps` steps, in a process of its own. The last
validation of each has `val/acceptance` and `val/accepted_length` (of drafts of four tokens).

    python benchmarks/drafts.py --steps 400 --seeds 0 1 2 --output build/drafts

writes OUTPUT/results.json after each run (a repeated call resumes) and OUTPUT/report.md. `--quick` checks in about a
minute that the script runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from measuring import fit_arguments, machine, mean_and_spread, run_fits, short_fit

from kd_lightning import DistillationModule, InstructionDataModule
from kd_lightning.reporting.run_dir import RunFolder

RUNS = {
    "forward KL": ("quickstart", ()),
    "total variation": ("quickstart", ("--model.objective", "TotalVariation")),
    "config `draft`": ("draft", ()),
}
COLUMNS = {"acceptance": ("val/acceptance", 3), "accepted length": ("val/accepted_length", 3)}
COLUMNS |= {"total variation": ("val/total_variation", 3), "forward KL": ("val/forward_kl", 3), "NLL": ("val/ce", 3)}


def before() -> dict[str, float]:
    """The metrics of the bundled student."""
    module = DistillationModule("asset:student", teacher="asset:teacher")
    data = InstructionDataModule("asset:train", "asset:validation", tokenizer="asset:student", batch_size=32)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    return {name: float(found[name]) for name, _ in COLUMNS.values()}


def report(results: list[dict[str, Any]], start: dict[str, float]) -> str:
    """Mean ± standard deviation over the seeds of each run."""
    seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
    lines = [f"{machine(1)}; validation rows; {results[0]['steps']} steps; seeds {seeds}", ""]
    lines += [f"| trained on | seeds | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    cells = [f"{start[name]:.{digits}f}" for name, digits in COLUMNS.values()]
    lines.append(f"| before | | {' | '.join(cells)} |")
    for run in RUNS:
        found = [r for r in results if r["run"] == run]
        if found:
            cells = [mean_and_spread([r[name] for r in found], digits) for name, digits in COLUMNS.values()]
            lines.append(f"| {run} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = fit_arguments(parser, words, 400, "drafts", "two steps of one seed")
    start = before()

    def fit(run: str, seed: int, steps: int) -> dict[str, Any]:
        config, more = RUNS[run]
        root = arguments.output / f"{list(RUNS).index(run)}-{seed}-{steps}"
        found = short_fit(config, seed, steps, root, *more)
        folder = RunFolder.read(root)
        return {**found, **{name: folder.last(name) for name, _ in COLUMNS.values()}}

    keys = [(run, seed, arguments.steps) for seed in arguments.seeds for run in RUNS]
    run_fits(keys, fit, lambda results: report(results, start), arguments.output, arguments.jobs)


if __name__ == "__main__":
    main()
