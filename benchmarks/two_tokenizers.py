"""Distillation across two tokenizers, compared with labels and with the teacher's answers as labels (SeqKD).

All runs start from the bundled student whose tokenizer is not the teacher's, with the optimizer, schedule, batches and
number of rows of the shipped config `cross_tokenizer`, in a plain loop: the rows are tokenized once and the teacher's
hidden states of the training rows are computed once. The teacher's answers of SeqKD are sampled once per seed with
`kd-lightning generate`. Evaluated on the test rows, with every measure per byte of the answers, so that it does not
depend on a tokenizer: forward KL at the positions where both models have read the same bytes, on the shared tokens and
one outcome for all others; NLL; exact match of greedy answers (categories); and the teacher's NLL of the student's
samples, which the teacher reads in its own tokens.

    python benchmarks/two_tokenizers.py --steps 300 --seeds 0 1 2 3 4 --jobs 2 --output build/two_tokenizers

writes OUTPUT/results.json after each run (a repeated call resumes) and OUTPUT/report.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measuring import machine, mean_and_spread
from on_policy import exact_match
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd_lightning import (
    ChunkLikelihood,
    DistillationLoss,
    Divergence,
    ForwardKL,
    InstructionDataModule,
    LossParts,
    WeightedSum,
)
from kd_lightning.assets import resolve
from kd_lightning.data.collate import left_pad
from kd_lightning.models.generate import Sampling, generate

STUDENT = "asset:student_byte_fallback"
SEQKD = "teacher's answers as labels (SeqKD)"


def chunks() -> Divergence:
    """Chunk likelihood times τ, so that its size does not depend on τ."""
    return WeightedSum([ChunkLikelihood(tau=100.0)], [100.0])


def both() -> Divergence:
    """Forward KL and chunk likelihood."""
    return WeightedSum([ForwardKL(), ChunkLikelihood(tau=100.0)], [1.0, 100.0])


RUNS: dict[str, tuple[Callable[[], Divergence], float, float]] = {  # objective, ce_weight, learning rate
    "labels only": (ForwardKL, 1.0, 8e-3),
    "labels only, rate 2e-3": (ForwardKL, 1.0, 2e-3),
    SEQKD: (ForwardKL, 1.0, 2e-3),
    "chunk likelihood": (chunks, 0.0, 8e-3),
    "forward KL": (ForwardKL, 0.0, 8e-3),
    "forward KL, labels with weight 0.2": (ForwardKL, 0.2, 8e-3),
    "forward KL and chunk likelihood": (both, 0.0, 8e-3),
}
COLUMNS = {"forward_kl": 4, "nll": 4, "exact_match": 3, "sample_nll": 3}
TITLES = {
    "forward_kl": "forward KL per byte",
    "nll": "NLL per byte",
    "exact_match": "exact match of the category",
    "sample_nll": "teacher's NLL per byte of samples",
}


class Pair:
    """The bundled teacher and the student with another tokenizer, and the rows that both read.

    Args:
        folder: Where the teacher's hidden states of the training rows are kept, computed once.
        rows: Number of test rows per kind of measurement.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.teacher = load("asset:teacher")
        self.head = self.teacher.lm_head.weight.detach()
        self.data = data_of("asset:train")
        self.map = self.data.vocabulary_map
        self.loss = DistillationLoss(ForwardKL(), reduction="sum", diagnostics=True, compile=False)
        self.hidden = self._hidden_states()

    @torch.no_grad()
    def _hidden_states(self) -> list[Tensor]:
        path = self.folder / "teacher.pt"
        if not path.exists():
            found: dict[int, Tensor] = {}
            for batch in self.data.train_dataloader():
                own = {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
                states = self.teacher.model(**own).last_hidden_state
                lengths = own["attention_mask"].sum(1).tolist()
                for row, state, length in zip(batch["row_ids"].tolist(), states, lengths, strict=True):
                    found[row] = state[:length].clone()
            torch.save([found[row] for row in sorted(found)], path)
        hidden: list[Tensor] = torch.load(path, weights_only=True)
        return hidden

    def train(self, run: str, seed: int, steps: int) -> Any:
        """The student after training, with the optimizer and schedule of the config `cross_tokenizer`."""
        objective, ce_weight, rate = RUNS[run]
        loss = DistillationLoss(objective(), ce_weight=ce_weight, reduction="sequence_mean", compile=False)
        data = self.data if run != SEQKD else data_of(answers(self.folder, seed))
        torch.manual_seed(seed)
        student = load(STUDENT).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.5)
        for batch in shuffled(data, seed, steps):
            parts = self._loss(loss, student, batch)
            optimizer.zero_grad()
            parts.mean.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return student.eval()

    def _loss(self, loss: DistillationLoss, student: Any, batch: dict[str, Tensor]) -> LossParts:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours = student.model(**inputs).last_hidden_state[:, :-1], student.lm_head.weight
        labels = batch["labels"][:, 1:]
        if not loss.reads_teacher:
            return loss.from_hidden(*ours, None, None, labels)
        known = [self.hidden[row] for row in batch["row_ids"].tolist()]
        theirs = torch.nn.utils.rnn.pad_sequence(known, batch_first=True)[:, :-1], self.head
        own = {"teacher_labels": batch["teacher_labels"][:, 1:], "vocabulary_map": self.map}
        return loss.from_hidden(*ours, *theirs, labels, **own, teacher_positions=shifted_positions(batch))

    @functools.cached_property
    def test(self) -> tuple[InstructionDataModule, list[dict[str, Any]], int]:
        """The test rows as both models read them, as they stand in the file, and the step between those measured."""
        data = data_of("asset:train", test="asset:test")
        lines = Path(resolve("asset:test")).read_text(encoding="utf-8").splitlines()
        return data, [json.loads(line) for line in lines], max(1, len(lines) // self.rows)

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, float]:
        """All columns for a student."""
        data, rows, stride = self.test
        sums, size = {"kd": 0.0, "student_nll": 0.0}, 0
        for batch in data.test_dataloader():
            chosen = batch["row_ids"] % stride == 0
            if not chosen.any():
                continue
            values = self._values(student, {name: column[chosen] for name, column in batch.items()})
            sums = {name: sums[name] + float(values[name].sum()) for name in sums}
            size += sum(len(rows[n]["output"].encode()) for n in batch["row_ids"][chosen].tolist())
        prompts = data.generation_rows("test")
        return {
            "forward_kl": sums["kd"] / size,
            "nll": sums["student_nll"] / size,
            "exact_match": exact_match(student, data, prompts, tokens=10),
            "sample_nll": self._sample_nll(student, prompts[::stride]),
        }

    def _values(self, student: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
        return self.loss.from_logits(
            student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1],
            self.teacher(**own).logits[:, :-1],
            batch["labels"][:, 1:],
            vocabulary_map=self.map,
            teacher_positions=shifted_positions(batch),
        ).values

    def _sample_nll(self, student: Any, rows: Sequence[Any]) -> float:
        """The teacher's NLL of the student's samples, in its own tokens, per byte of the samples."""
        data, total, size = self.test[0], 0.0, 0
        for n in range(0, len(rows), 100):
            part = rows[n : n + 100]
            inputs = left_pad([row["prompt_ids"] for row in part], data.pad_id)
            found = generate(student, inputs["input_ids"], inputs["attention_mask"], Sampling(40), seed=n)
            texts = data.tokenizer.batch_decode(found, skip_special_tokens=True)
            nll, count = self.score([row["row"] for row in part], texts)
            total, size = total + nll, size + count
        return total / size

    def score(self, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> tuple[float, int]:
        """The teacher's NLL of these answers, with the end of the turn, and their number of bytes."""
        tokenizer = self.data.teacher_tokenizer
        ids, starts, size = [], [], 0
        for row, text in zip(rows, texts, strict=True):
            if not text.strip():
                continue
            question = "\n".join(filter(None, (row["instruction"], row["input"])))
            user, answer = {"role": "user", "content": question}, {"role": "assistant", "content": text.strip()}
            prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
            starts.append(len(tokenizer(prompt, add_special_tokens=False).input_ids))
            ids.append(tokenizer(whole, add_special_tokens=False).input_ids)
            size += len(text.strip().encode())
        if not ids:
            return 0.0, 0
        width = max(map(len, ids))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        mask = torch.tensor([[n < len(row) for n in range(width)] for row in ids])
        log_p = self.teacher(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
        found = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        counted = mask[:, 1:] & (torch.arange(1, width) >= torch.tensor(starts)[:, None])
        return -float(found[counted].sum()), size

    @torch.no_grad()
    def measure_teacher(self) -> dict[str, float | None]:
        """The teacher's own NLL of the answers and exact match; its forward KL is 0."""
        _, rows, stride = self.test
        nll, size = self.score(rows[::stride], [row["output"] for row in rows[::stride]])
        own = InstructionDataModule("asset:train", test="asset:test", tokenizer="asset:teacher")
        own.setup("test")
        right = exact_match(self.teacher, own, own.generation_rows("test"), tokens=10)
        return {"forward_kl": 0.0, "nll": nll / size, "exact_match": right, "sample_nll": None}


def load(name: str) -> Any:
    """A bundled model in fp32."""
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()


def data_of(train: str, **more: str) -> InstructionDataModule:
    """Rows in the tokens of both models."""
    data = InstructionDataModule(
        train, tokenizer=STUDENT, teacher_tokenizer="asset:teacher", batch_size=32, max_length=128, seed=0, **more
    )
    data.setup("test" if more else "fit")
    return data


def shuffled(data: InstructionDataModule, seed: int, steps: int) -> list[dict[str, Tensor]]:
    """Batches of several passes; the order of the batches depends on the seed."""
    random, found = torch.Generator().manual_seed(seed), []
    while len(found) < steps:
        batches = list(data.train_dataloader())
        found += [batches[n] for n in torch.randperm(len(batches), generator=random).tolist()]
    return found[:steps]


def shifted_positions(batch: dict[str, Tensor]) -> Tensor:
    """The teacher's positions, aligned with the labels without the first token."""
    return (batch["teacher_positions"][:, 1:] - 1).clamp_min(-1)


def answers(folder: Path, seed: int) -> str:
    """A file with the training rows and the teacher's answers, sampled once per seed."""
    path = folder / f"answers-{seed}.jsonl"
    if not path.exists():
        out = folder / f"responses-{seed}.jsonl"
        words = [sys.executable, "-m", "kd_lightning", "generate", "--model", "asset:teacher", "--data", "asset:train"]
        words += ["--output", str(out), "--max_new_tokens", "32", "--batch_size", "128", "--seed", str(seed)]
        subprocess.run([*words, "--progress", "false"], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        kept = [{**row, "output": row["response"]} for row in rows if row["response"].strip()]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return str(path)


def report(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds of each run."""
    seeds = sorted({r["seed"] for r in results if r["steps"]})
    lines = [f"{machine(1)}; seeds {', '.join(map(str, seeds))}", ""]
    lines.append(f"| run | steps | seeds | CPU s | {' | '.join(TITLES.values())} |")
    lines.append("|---" * (4 + len(COLUMNS)) + "|")
    names = dict.fromkeys(["teacher", "student before", *RUNS, *(r["run"] for r in results)])
    for name in names:
        if group := [r for r in results if r["run"] == name]:
            cells = [_spread([r[column] for r in group], digits) for column, digits in COLUMNS.items()]
            seconds = f"{statistics.mean(r['seconds'] for r in group):.0f}" if group[0]["steps"] else ""
            lines.append(f"| {name} | {group[0]['steps'] or ''} | {len(group)} | {seconds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(found: list[float | None], digits: int) -> str:
    values = [value for value in found if value is not None]
    return mean_and_spread(values, digits) if values else ""


def work(run: str, seed: int, steps: int, output: Path, rows: int) -> dict[str, Any]:
    """One run and its evaluation, in a process that may do several; CPU seconds of the training alone."""
    pair = pair_of(output, rows)
    before = time.process_time()
    student = pair.train(run, seed, steps)
    seconds = time.process_time() - before
    return {"run": run, "seed": seed, "steps": steps, "seconds": seconds, **pair.measure(student)}


@functools.cache
def pair_of(folder: Path, rows: int) -> Pair:
    """The two models and their rows, loaded once in a process."""
    torch.set_num_threads(1)
    return Pair(folder, rows)


class Results:
    """The results in a folder, rewritten after each run.

    Args:
        output: The folder.
    """

    def __init__(self, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.path = output, output / "results.json"
        there = self.path.exists()
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8")) if there else []

    def has(self, run: str, seed: int, steps: int) -> bool:
        """Whether this run has a result."""
        return any((r["run"], r["seed"], r["steps"]) == (run, seed, steps) for r in self.rows)

    def keep(self, found: dict[str, Any]) -> None:
        """Add one result and write all."""
        self.rows.append(found)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        (self.output / "report.md").write_text(report(self.rows), encoding="utf-8")
        print({name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run everything that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--rows", type=int, default=500, help="number of test rows to evaluate")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--output", type=Path, default=Path("build/two_tokenizers"))
    args = parser.parse_args(words)
    results = Results(args.output)
    if not results.has("student before", 0, 0):
        pair = pair_of(args.output, args.rows)
        start = {"seed": 0, "steps": 0, "seconds": 0.0}
        results.keep({"run": "teacher", **start, **pair.measure_teacher()})
        results.keep({"run": "student before", **start, **pair.measure(load(STUDENT))})
    wanted = [(run, seed, args.steps) for seed in args.seeds for run in args.runs]
    left = [key for key in wanted if not results.has(*key)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, *key, args.output, args.rows) for key in left]):
            results.keep(done.result())


if __name__ == "__main__":
    main()
