"""Do assistants mitigate the gap between teacher and student? With and without one, where the gap is large and small.

The teacher is the bundled one (2.2 M parameters, four layers of 192 units). The students, by the forward KL at the
start: `tiny` has one layer of 16 units (36,000 parameters) and random weights (5.4 nats); `bundled` is the bundled
supervised student (1.6); `pruned` is two layers of the teacher (0.5). All arms of a student are trained by a plain loop
for the same number of steps, with the optimizer and schedule of the shipped configs. The learning rate of an arm is the
one of a grid with the lowest forward KL on the validation rows after training with one further seed; the report has the
whole grid.

Evaluated on test rows: forward and reverse KL to the teacher and NLL on the data's answers; the void mass, which is the
probability that the student gives to tokens with p < exp(-8); exact match of greedy responses (categories); the
teacher's NLL per token of the student's samples at temperature 1, and the share of sampled tokens with p < exp(-8).

    python benchmarks/assistants_gap.py --gaps tiny pruned --seeds 0 1 2 3 4 --output build/assistants_gap

writes OUTPUT/results.json after each run (a repeated call resumes) and OUTPUT/report.md, in one process with one
thread (45 minutes). `--quick` checks in about a minute that the script runs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import machine, mean_and_spread, program, run_fits
from on_policy import exact_match, sampled
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kd_lightning import (
    TAID,
    AlphaBeta,
    AMiD,
    DistillationLoss,
    Divergence,
    ForwardKL,
    InstructionDataModule,
    LossParts,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    update_schedules,
)
from kd_lightning.assets import resolve
from kd_lightning.data.collate import Collator

VOID = -8.0  # log p below which a token counts as void
TUNING = 100  # the seed of the learning-rate grid
BATCH = 32


def amid(alpha: float) -> Callable[[], Divergence]:
    """AMiD with the divergence and λ of the shipped config."""
    return lambda: AMiD(AlphaBeta(0.2, 0.7), alpha=alpha, teacher_weight=0.5)


ARMS: dict[str, tuple[Callable[[], Divergence], str]] = {  # the objective, and the arm without its assistant
    "forward KL": (ForwardKL, ""),
    "reverse KL": (ReverseKL, ""),
    "α-β (0.2, 0.7)": (lambda: AlphaBeta(0.2, 0.7), ""),
    "SkewKL(0.1)": (lambda: SkewKL(0.1), "forward KL"),
    "TAID": (TAID, "forward KL"),
    "SkewReverseKL(0.1)": (lambda: SkewReverseKL(0.1), "reverse KL"),
    "AMiD, α = −1": (amid(-1.0), "α-β (0.2, 0.7)"),
    "AMiD, α = 0.5": (amid(0.5), "α-β (0.2, 0.7)"),
    "AMiD, α = 1": (amid(1.0), "α-β (0.2, 0.7)"),
}
RATES = {"tiny": (1e-2, 2.5e-2, 6e-2), "bundled": (2e-3, 4e-3, 8e-3), "pruned": (1e-3, 3e-3)}
STEPS = {"tiny": 250, "bundled": 150, "pruned": 80}
COLUMNS = {
    "forward_kl": ("forward KL", 3),
    "reverse_kl": ("reverse KL", 3),
    "nll": ("NLL", 3),
    "void_mass": ("void mass", 4),
    "exact_match": ("exact match", 3),
    "sample_nll": ("teacher's NLL of samples", 2),
    "sample_void": ("void tokens of samples", 3),
}
HIGHER_IS_BETTER = ("exact_match",)
NOTES = f"""
Mean ± standard deviation over seeds. (+), (−): better or worse than the arm in the column *without*, which has the same
divergence and no assistant, by more than twice the standard deviation of the difference. Void: tokens to which the
teacher gives less than exp({VOID:g}).

- Seeds vary the order of the rows and the random weights of `tiny`, not data, teacher or tokenizer: the standard
  deviations understate the uncertainty.
- Learning rates are chosen by forward KL, for all arms alike. The grids show where reverse KL would choose another, and
  where the chosen one lies at an end of its grid.
- Evaluated on a part of the 2,000 test rows (`--rows`).
"""


class Pair:
    """The teacher, the rows and the teacher's hidden states on them, computed once.

    Args:
        folder: Where the pruned student is kept.
        rows: Number of test rows per kind of measurement.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.data = InstructionDataModule(
            "asset:train", "asset:validation", test="asset:test", tokenizer="asset:teacher", max_length=128
        )
        self.data.setup("fit")
        self.data.setup("test")
        self.teacher = load("asset:teacher")
        self.splits = {split: self.split(split) for split in ("train", "val", "test")}

    @torch.no_grad()
    def split(self, name: str) -> list[tuple[dict[str, Any], Tensor]]:
        """Rows of a split, each with the teacher's hidden states; of the test rows only those measured."""
        rows, _ = self.data.token_rows(name)
        items = rows[range(0, len(rows), max(1, len(rows) // self.rows) if name == "test" else 1)]
        items = sorted(items, key=lambda row: len(row["input_ids"]))
        found = []
        for start in range(0, len(items), 64):
            part = items[start : start + 64]
            batch = Collator(self.data.pad_id)(part)
            states = self.teacher.model(**inputs(batch)).last_hidden_state
            found += [(row, state[: len(row["input_ids"])].clone()) for row, state in zip(part, states, strict=True)]
        return found

    def batch(self, items: Sequence[tuple[dict[str, Any], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """A padded batch and the teacher's hidden states."""
        states = torch.nn.utils.rnn.pad_sequence([state for _, state in items], batch_first=True)
        return Collator(self.data.pad_id)([row for row, _ in items]), states

    def batches(self, steps: int, random: torch.Generator) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches of several passes over the training rows in random order."""
        rows, order = self.splits["train"], torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(rows), generator=random)
            yield self.batch([rows[n] for n in order[:BATCH].tolist()])
            order = order[BATCH:]

    def losses(self, loss: DistillationLoss, student: Any, batch: tuple[dict[str, Tensor], Tensor]) -> LossParts:
        """The parts of the loss of a batch."""
        rows, states = batch
        hidden = student.model(**inputs(rows)).last_hidden_state
        theirs = states[:, :-1], self.teacher.lm_head.weight
        return loss.from_hidden(hidden[:, :-1], student.lm_head.weight, *theirs, rows["labels"][:, 1:])

    def student(self, gap: str, seed: int) -> Any:
        """The student before training; the seed decides the weights of `tiny`."""
        if gap == "bundled":
            return load("asset:student")
        if gap == "pruned":
            if not (path := self.folder / "pruned").exists():
                program("prune", "--model", "asset:teacher", "--layers", "2", "--output", str(path))
            return load(str(path))
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"bos_token_id": None, "pad_token_id": self.data.pad_id, "eos_token_id": self.data.tokenizer.eos_token_id}
        return LlamaForCausalLM(LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **shape, **ids))

    def train(self, student: Any, arm: str, rate: float, seed: int, steps: int) -> Any:
        """The student after training, with the optimizer and schedule of the shipped configs."""
        loss = loss_of(arm)
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.5)
        student.train()
        for n, batch in enumerate(self.batches(steps, torch.Generator().manual_seed(seed)), start=1):
            parts = self.losses(loss, student, batch)
            optimizer.zero_grad()
            parts.mean.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_schedules(loss, n / steps, parts)
        return student.eval()

    @torch.no_grad()
    def distances(self, student: Any, split: str) -> dict[str, float]:
        """Means over the tokens of the data's answers."""
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.splits[split]), 64):
            rows, states = self.batch(self.splits[split][start : start + 64])
            labels = rows["labels"][:, 1:]
            kept = labels != -100
            log_p = self.teacher.lm_head(states[:, :-1][kept]).log_softmax(-1)
            log_q = student(**inputs(rows)).logits[:, :-1][kept].log_softmax(-1)
            values = {
                "forward_kl": ForwardKL()(log_p, log_q),
                "reverse_kl": ReverseKL()(log_p, log_q),
                "nll": -log_q.gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1),
                "void_mass": (log_q.exp() * (log_p < VOID)).sum(-1),
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return {name: float(torch.cat(values).mean()) for name, values in found.items()}

    def measure(self, student: Any) -> dict[str, float]:
        """All columns."""
        prompts = self.data.generation_rows("test")
        stride = max(1, len(prompts) // self.rows)
        categories = [row for row in prompts if row["row"]["task"] == "category"][:: max(1, stride // 2)]
        found = {
            **self.distances(student, "test"),
            "exact_match": exact_match(student, self.data, categories, size=200),
        }
        return {**found, **self.samples(student, prompts[::stride])}

    @torch.no_grad()
    def samples(self, student: Any, rows: Sequence[Any]) -> dict[str, float]:
        """The teacher's NLL of the student's samples, and the share of their tokens with p < exp(VOID)."""
        found = []
        for batch in sampled(student, self.data, rows):
            labels = batch["labels"][:, 1:]
            log_p = self.teacher(**inputs(batch)).logits[:, :-1].log_softmax(-1)
            found.append(log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)[labels != -100])
        log_p = torch.cat(found)
        return {"sample_nll": -float(log_p.mean()), "sample_void": float((log_p < VOID).double().mean())}


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model reads of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def load(name: str) -> Any:
    """A bundled model in fp32."""
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()


def loss_of(arm: str) -> DistillationLoss:
    """The loss of an arm, with its schedule at the start; compiled once."""
    loss, start = compiled(arm)
    loss.load_state_dict(start)
    return loss


@functools.cache
def compiled(arm: str) -> tuple[DistillationLoss, dict[str, Any]]:
    """The loss of an arm and its state at the start."""
    loss = DistillationLoss(ARMS[arm][0](), reduction="sequence_mean", compile=True)
    return loss, copy.deepcopy(loss.state_dict())


def tuned(results: Sequence[dict[str, Any]], gap: str) -> dict[str, float]:
    """The learning rate of each arm with the lowest forward KL on the validation rows."""
    found: dict[str, tuple[float, float]] = {}
    for r in results:
        if r["gap"] == gap and r["seed"] == TUNING and r["arm"] in ARMS:
            here = (r["student_after"]["forward_kl"], r["rate"])
            found[r["arm"]] = min(found.get(r["arm"], here), here)
    return {arm: rate for arm, (_, rate) in found.items()}


def cell(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], column: str, digits: int) -> str:
    """Mean ± standard deviation; + or − where it differs from the arm without the assistant by twice the spread."""
    values, without = ([r["student_after"][column] for r in part] for part in (rows, others))
    text, sign = mean_and_spread(values, digits), ""
    if len(without) > 1 and len(values) > 1:
        change = statistics.mean(values) - statistics.mean(without)
        spread = math.hypot(statistics.stdev(values), statistics.stdev(without))
        if abs(change) > 2 * spread:
            sign = " (+)" if (change > 0) == (column in HIGHER_IS_BETTER) else " (−)"
    return text + sign


def report(results: Sequence[dict[str, Any]]) -> str:
    """For each student the table of the arms and the grid of learning rates."""
    text = f"# Assistants and the gap\n\n{machine(1)}.\n"
    for gap in RATES:
        mine = [r for r in results if r["gap"] == gap]
        measured = [r for r in mine if r["seed"] != TUNING and r["arm"] in ARMS]
        if not measured:
            continue
        text += f"\n## {gap}: {measured[0]['steps']} steps\n\n"
        text += f"| arm | without | rate | seeds | {' | '.join(name for name, _ in COLUMNS.values())} |\n"
        text += f"|{'---|' * (4 + len(COLUMNS))}\n"
        for start in (r for r in mine if r["arm"] == "before"):
            cells = [f"{start['student_after'][column]:.{digits}f}" for column, (_, digits) in COLUMNS.items()]
            text += f"| before | | | | {' | '.join(cells)} |\n"
        for arm, (_, without) in ARMS.items():
            if rows := [r for r in measured if r["arm"] == arm]:
                others = [r for r in measured if r["arm"] == without]
                cells = [cell(rows, others, column, digits) for column, (_, digits) in COLUMNS.items()]
                text += f"| {arm} | {without} | {rows[0]['rate']:g} | {len(rows)} | {' | '.join(cells)} |\n"
        text += f"\n### Learning rates of {gap}\n\nForward KL / reverse KL on the validation rows, seed {TUNING}.\n\n"
        text += f"| arm | {' | '.join(f'{rate:g}' for rate in RATES[gap])} |\n|{'---|' * (1 + len(RATES[gap]))}\n"
        for arm in dict.fromkeys(r["arm"] for r in mine if r["seed"] == TUNING):
            tried = {r["rate"]: r["student_after"] for r in mine if r["seed"] == TUNING and r["arm"] == arm}
            cells = [f"{x['forward_kl']:.3f} / {x['reverse_kl']:.3f}" for _, x in sorted(tried.items())]
            text += f"| {arm} | {' | '.join(cells)} |\n"
    return text + NOTES


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaps", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help=f"other than {TUNING}")
    parser.add_argument("--rows", type=int, default=250, help="number of test rows to evaluate")
    parser.add_argument("--output", type=Path, default=Path("build/assistants_gap"))
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: meaningless figures")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    pair = Pair(args.output, args.rows)

    def fit(run: str, seed: int, steps: int) -> dict[str, Any]:
        gap, arm, rate = json.loads(run)
        before, student = time.process_time(), pair.student(gap, seed)
        if steps:
            student = pair.train(student, arm, rate, seed, steps)
        seconds = time.process_time() - before
        after = pair.distances(student, "val") if seed == TUNING else pair.measure(student)
        return {"gap": gap, "arm": arm, "rate": rate, "seconds": seconds, "student_after": after}

    def run(keys: Sequence[tuple[Any, int, int]]) -> None:
        named = [(json.dumps(key, ensure_ascii=False), seed, steps) for key, seed, steps in keys]
        run_fits(named, fit, report, args.output, 1)

    for gap in args.gaps:
        steps = 2 if args.quick else STEPS[gap]
        run([((gap, "before", 0.0), args.seeds[0], 0)])
        run([((gap, arm, rate), TUNING, steps) for arm in args.arms for rate in RATES[gap]])
        rates = tuned(json.loads((args.output / "results.json").read_text(encoding="utf-8")), gap)
        run([((gap, arm, rates[arm]), seed, steps) for seed in args.seeds for arm in args.arms])


if __name__ == "__main__":
    main()
