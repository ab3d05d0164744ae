"""The benefit of generated responses: every source of responses compared with forward KL on the bundled rows.

Every run is a separate process with the shipped config, all with the same number of steps and the same start. Then
`forward_kl (same time)` gets as many steps as fit into the CPU time of the slowest run. Generation before or between
the steps (seqkd, distillm2) is part of a run and of its time. Evaluated on the test rows, before and after: forward and
reverse KL to the teacher and NLL on the data's answers, exact match of greedy responses (categories), and the teacher's
NLL per token of the student's samples at temperature 1.

    python benchmarks/on_policy.py --steps 1000 --seeds 0 1 2 --same_time --output build/on_policy

writes build/on_policy/results.json after each run (a repeated call resumes; another number of steps needs another
folder) and build/on_policy/report.md.

    python benchmarks/on_policy.py --speed --output build/responses

runs responses.py, which writes the cost of a step to OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import responses
from kd_lightning import DistillationModule, InstructionDataModule
from kd_lightning.data.collate import Collator, left_pad
from kd_lightning.models.generate import Sampling, generate
from kd_lightning.rollout.batches import append, live_tokens
from kd_lightning.teachers.hf import HFTeacher

RUNS = {"forward_kl": "quickstart", **{name: name for name in ("seqkd", "gkd", "distillm", "distillm2", "minillm")}}
COLUMNS = ("forward_kl", "reverse_kl", "nll", "exact_match", "sample_nll")


def command(root: Path, config: str, steps: int, seed: int, validate: int) -> list[str]:
    """Command of a run under `root` that validates every `validate` steps, without the results table."""
    words = [sys.executable, "-m", "kd_lightning", "fit", "--config", config, "--trainer.default_root_dir", str(root)]
    words += ["--seed_everything", str(seed), "--trainer.max_steps", str(steps), "--trainer.limit_test_batches", "0"]
    words += ["--trainer.val_check_interval", str(validate), "--trainer.accelerator", "cpu"]
    words += [] if config == "sft" else ["--model.lr_scheduler.total_iters", str(steps)]  # constant learning rate
    return [*words, "--trainer.enable_progress_bar", "false"]


def train(root: Path, config: str, steps: int, seed: int, extra: list[str]) -> float:
    """Run from scratch under `root` and return the CPU seconds, start-up included."""
    shutil.rmtree(root, ignore_errors=True)  # responses cached by an interrupted run would not be timed
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command(root, config, steps, seed, 125), *extra], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Bench:
    """Evaluates a student with the test rows and the teacher.

    Args:
        rows: Number of test rows per kind of measurement.
    """

    def __init__(self, rows: int) -> None:
        self.data = InstructionDataModule("asset:train", test="asset:test", tokenizer="asset:teacher", max_length=128)
        self.data.setup("test")
        self.teacher = HFTeacher("asset:teacher")
        self.rows = rows

    @torch.no_grad()
    def measure(self, student: str) -> dict[str, float]:
        """All columns for the student in a folder."""
        module = DistillationModule(student, self.teacher)
        module.configure_model()
        rows, _ = self.data.token_rows("test")
        items = rows[range(len(rows))]
        stride = max(1, len(items) // self.rows)
        found: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(items[::stride]), 64):
            batch = Collator(self.data.pad_id)(items[::stride][start : start + 64])
            for name, values in module.evaluate_batch(batch).values.items():
                found.setdefault(name, []).append(values)
        mean = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        prompts = self.data.generation_rows("test")
        return {
            **{name: mean[name] for name in ("forward_kl", "reverse_kl")},
            "nll": mean["student_nll"],
            "exact_match": exact_match(module.student, self.data, prompts),
            "sample_nll": self.sample_nll(module, prompts[::stride]),
        }

    def sample_nll(self, module: DistillationModule, rows: list[dict[str, Any]]) -> float:
        """The teacher's NLL per token of the student's samples."""
        batches = sampled(module.student, self.data, rows)
        return float(torch.cat([module.evaluate_batch(batch).values["teacher_nll"] for batch in batches]).mean())


def exact_match(
    student: Any, data: InstructionDataModule, prompts: Sequence[Any], tokens: int = 8, size: int = 100
) -> float:
    """Fraction of the categories that a greedy response gives; `size` prompts are answered at a time."""
    rows, right = [row for row in prompts if row["row"]["task"] == "category"], 0
    for part in (rows[n : n + size] for n in range(0, len(rows), size)):
        inputs = left_pad([row["prompt_ids"] for row in part], data.pad_id)
        responses = generate(student, inputs["input_ids"], inputs["attention_mask"], Sampling(tokens, temperature=0.0))
        texts = data.tokenizer.batch_decode(responses, skip_special_tokens=True)
        right += sum(text.strip() == row["answer"].strip() for text, row in zip(texts, part, strict=True))
    return right / len(rows)


def sampled(student: Any, data: InstructionDataModule, rows: Sequence[Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the student's samples, whose labels are the sampled tokens."""
    ends = torch.tensor([data.tokenizer.eos_token_id])
    for n in range(0, len(rows), 100):
        inputs = left_pad([row["prompt_ids"] for row in rows[n : n + 100]], data.pad_id)
        prompt = (inputs["input_ids"], inputs["attention_mask"])
        tokens = generate(student, *prompt, Sampling(32), seed=n)
        live = live_tokens(tokens, ends, torch.ones(len(tokens), dtype=torch.bool))
        yield append({"labels": torch.full_like(prompt[0], -100)}, prompt, tokens, live)


def report(results: list[dict[str, Any]]) -> str:
    """A table with the mean over seeds, and the standard deviation if there are several."""
    lines = ["| run | steps | seeds | CPU s | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (4 + len(COLUMNS))]
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["run"], []).append(result)
    for name, group in groups.items():
        cells = [name, str(round(statistics.mean(r["steps"] for r in group))), str(len(group))]
        for column in ("seconds", *COLUMNS):
            values = [r[column] for r in group]
            digits = 0 if column == "seconds" else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Run everything that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--rows", type=int, default=500, help="number of test rows to evaluate")
    parser.add_argument("--same_time", action="store_true", help="also forward KL for the time of the slowest run")
    parser.add_argument("--speed", action="store_true", help="measure only the cost of a step")
    parser.add_argument("--output", type=Path, default=Path("build/on_policy"))
    parser.add_argument("extra", nargs="*", help="after `--`: more arguments for every run")
    args = parser.parse_args(words)
    if args.speed:
        return responses.main(["--output", str(args.output)])
    if args.same_time and "forward_kl" not in args.runs:
        parser.error("--same_time needs the time of forward_kl: add forward_kl to --runs")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    bench = Bench(args.rows)

    def add(run: str, seed: int, steps: int) -> None:
        if any(r["run"] == run and r["seed"] == seed for r in results):
            return
        print(f"{run}, seed {seed}, {steps} steps", flush=True)
        student, seconds = "asset:student", 0.0
        if steps:
            config = RUNS[run.split(" ")[0]]
            student = str(args.output / f"{run.replace(' ', '_')}-{seed}" / "student")
            seconds = train(Path(student).parent, config, steps, seed, args.extra)
        results.append({"run": run, "seed": seed, "steps": steps, "seconds": seconds, **bench.measure(student)})
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        (args.output / "report.md").write_text(report(results), encoding="utf-8")
        print(report(results[-1:]), flush=True)

    add("start", 0, 0)
    for seed in args.seeds:
        for run in args.runs:
            add(run, seed, args.steps)
        if args.same_time:
            seconds = {r["run"]: r["seconds"] for r in results if r["seed"] == seed and r["steps"]}
            add("forward_kl (same time)", seed, round(args.steps * max(seconds.values()) / seconds["forward_kl"]))


if __name__ == "__main__":
    main()
