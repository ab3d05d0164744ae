"""Speed of `kd-lightning generate` relative to bare `model.generate` on the same batches and to one row at a time.

CPU seconds per token. All variants generate the same greedy responses, up to the end token or `--new` tokens; ours also
writes them to a file. Every round is a separate process in which the variants take turns after model and rows are
loaded, so that a slowdown of the machine affects all of them alike.

    python benchmarks/generate.py --rows 256 --rounds 5 --output build/generate

writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import in_a_process, machine, spread, write

from kd_lightning.data.collate import left_pad
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import TextTokenizer, load_tokenizer
from kd_lightning.generation.batch_generator import BatchGenerator, batches_of_rank, length_batches, write_responses
from kd_lightning.generation.response_file import ResponseFile
from kd_lightning.models.generate import Sampling
from kd_lightning.models.loading import load_causal_lm

WAYS = ("ours", "bare", "one by one", "ours, file order")


def calls(way: str, model_name: str, rows: int, batch_size: int, new: int) -> Callable[[], int]:
    """The function to measure: it responds to all rows and returns the number of tokens."""
    found = list(read_rows("asset:train", "train"))[:rows]
    tokenizer = load_tokenizer(model_name)
    text = TextTokenizer(tokenizer)
    prompts = [text.prompt(parse_question(row, place))[1] for place, row in found]
    model: Any = load_causal_lm(model_name, kwargs={"dtype": "float32"}, role="model")
    pad = tokenizer.pad_token_id
    plan = length_batches([len(prompt) for prompt in prompts], 1 if way == "one by one" else batch_size)
    if way == "ours, file order":
        plan = [list(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)]
    inputs = [left_pad([prompts[row] for row in batch], pad) for batch in plan]

    def bare() -> int:
        tokens = 0
        for batch in inputs:
            written = model.generate(**batch, max_new_tokens=new, do_sample=False, pad_token_id=pad)
            tokens += int(written[:, batch["input_ids"].shape[1] :].ne(pad).sum())
        return tokens

    def ours() -> int:
        writer = BatchGenerator(model, tokenizer, Sampling(new, 0.0))
        with tempfile.TemporaryDirectory() as folder:
            with ResponseFile(Path(folder) / "out.jsonl", [row for _, row in found], "m", {}) as file:
                write_responses(file, writer.generate(prompts, batches_of_rank(plan)), bar=False)
                return sum(response.tokens for response in file.responses)

    return bare if way == "bare" else ours


def measure(words: argparse.Namespace) -> None:
    """One round: CPU seconds and tokens of every variant, after a warm-up call; the variants take turns."""
    torch.set_num_threads(words.threads)
    ways = {way: calls(way, words.model, words.rows, words.batch_size, words.new) for way in WAYS}
    tokens = {way: call() for way, call in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(words.turns):
        for way, call in ways.items():
            began = time.process_time()
            call()
            seconds[way].append(time.process_time() - began)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


def table(rounds: list[dict[str, Any]]) -> str:
    """Tokens per CPU second of every variant, and the speed of ours relative to it, turn by turn."""
    lines = ["| variant | tokens per CPU second | ours / variant |", "|---|---|---|"]
    rates = {
        way: [one["tokens"][way] / seconds for one in rounds for seconds in one["seconds"][way]]
        for way in rounds[0]["tokens"]
    }
    for way, found in rates.items():
        ratio = [a / b for a, b in zip(rates["ours"], found, strict=True)]
        lines.append(f"| {way} | {spread(found, 0)} | {spread(ratio)} |")
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="asset:teacher")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="calls of every variant per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("build/generate"))
    parser.add_argument("--quick", action="store_true", help="check that it runs, on a few rows")
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args(args)
    if words.round:
        return measure(words)
    if words.quick:
        words.rows, words.batch_size, words.new, words.rounds, words.turns = 8, 4, 4, 1, 1
    names = ("model", "rows", "batch_size", "new", "turns", "threads")
    shared = [f"--{name}={getattr(words, name)}" for name in names]
    rounds = []
    for _ in range(words.rounds):
        found = in_a_process(__file__, [*shared, "--round"])
        if isinstance(found, str):
            raise SystemExit(found)
        rounds.append(found)
    head = f"{words.model}, {words.rows} rows, batches of {words.batch_size}, at most {words.new} new tokens"
    record = {"machine": machine(words.threads), "settings": shared, "rounds": rounds}
    write(words.output, record, f"{record['machine']}\n\n{head}; {words.rounds} rounds\n\n{table(rounds)}")


if __name__ == "__main__":
    main()
