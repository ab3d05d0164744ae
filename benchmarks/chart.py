"""Plot time and memory against tokens and against vocabulary, from the results of several shapes.

    for n in 256 1024 4096 16384; do
        python benchmarks/engine.py --shape 16384,256,512,$n --cases forward_kl,jsd:naive --output build/N$n
    done
    python benchmarks/chart.py build/N*.json build/V*.json --output build/cost.svg

Top: CPU time / plain matmuls; bottom: peak / floor. Left: against tokens, from the largest set of results that differ
in nothing else; right: likewise against vocabulary. A case that was not measured in a file is skipped there.
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


TOKENS, VOCABULARY = 3, 0  # indices into a shape


def alike(records: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """The largest set of records whose shapes differ in one index only, sorted by it."""
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["shape"][index]):
        shape = record["shape"]
        groups.setdefault((*shape[:index], *shape[index + 1 :]), []).append(record)
    return max(groups.values(), key=len)


def points(records: list[dict[str, Any]], case: str, figure: str, index: int) -> list[tuple[float, float]]:
    """Size and median ratio of a case in every record that has it."""
    found = []
    for record in records:
        rounds, plain = record["results"].get(case), record["results"]["plain"]
        if rounds:
            unit = statistics.median(r["cpu"] for r in plain)
            ratios = [r["cpu"] / unit if figure == "time" else r["peak"] / r["floor"] for r in rounds]
            found.append((record["shape"][index], statistics.median(ratios)))
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/cost.svg"))
    args = parser.parse_args(words)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for column, (index, name) in enumerate(((TOKENS, "tokens"), (VOCABULARY, "vocabulary"))):
        group = alike(records, index)
        shape = group[0]["shape"]
        fixed = f"vocabulary {shape[VOCABULARY]:,}" if index == TOKENS else f"{shape[TOKENS]:,} tokens"
        for row, (what, label) in enumerate((("time", "CPU time / plain"), ("peak", "peak / floor"))):
            axis = axes[row, column]
            for case in CASES:
                if found := points(group, case, what, index):
                    axis.plot(*zip(*found, strict=True), marker="o", label=case)
            axis.set(xscale="log", yscale="log")
            axis.axhline(1, color="gray", linewidth=0.8)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(f"{fixed}, widths {shape[1]} and {shape[2]}")
        axes[1, column].set(xlabel=name, xticks=[record["shape"][index] for record in group])
        axes[1, column].set_xticklabels([f"{record['shape'][index]:,}" for record in group])
        axes[1, column].minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1, fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    plt.close(figure)


if __name__ == "__main__":
    main()
