"""Time and memory against tokens and vocabulary, drawn from the results of several shapes.

    python benchmarks/chart.py build/V4099.json build/V32768.json build/V50257.json --output build/cost.svg

Left: CPU time over the plain products; right: peak over the floor, both against rows × vocabulary. A case that was not
measured in a file is left out there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

CASES = ("forward_kl", "jsd", "amid", "forward_kl:eager", "forward_kl:naive", "jsd:naive", "jsd:trl_gkd")


def points(records: list[dict[str, Any]], case: str, figure: str) -> list[tuple[float, float]]:
    """Size and median ratio of a case in every record that has it."""
    found = []
    for record in records:
        rounds, plain = record["results"].get(case), record["results"]["plain"]
        if rounds:
            unit = statistics.median(r["cpu"] for r in plain)
            ratios = [r["cpu"] / unit if figure == "time" else r["peak"] / r["floor"] for r in rounds]
            found.append((record["shape"][0] * record["shape"][3], statistics.median(ratios)))
    return sorted(found)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/cost.svg"))
    args = parser.parse_args(words)
    records = [json.loads(path.read_text()) for path in args.results]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, what, label in zip(axes, ("time", "peak"), ("CPU time / plain", "peak / floor"), strict=True):
        for case in CASES:
            if found := points(records, case, what):
                axis.plot(*zip(*found, strict=True), marker="o", label=case)
        axis.set(xscale="log", yscale="log", xlabel="rows × vocabulary", ylabel=label)
        axis.axhline(1, color="grey", linewidth=0.8)
    axes[1].legend(fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    plt.close(figure)


if __name__ == "__main__":
    main()
