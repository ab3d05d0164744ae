"""Test a real server as a teacher, ask it for rows, and print one page with what was found.

    python benchmarks/on_server.py http://localhost:8000 --tokenizer NAME_OR_FOLDER --rows 100 --top_k 20

The key is read from OPENAI_API_KEY. The rows are those of `--data` (default: the bundled ones), and the server must
have the tokens of `--tokenizer`. Nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kd_lightning.data import InstructionDataModule
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.models.scoring.scorer import PromptScorer, detect_dialect
from kd_lightning.teachers.server_checks import check_scores


def prompts(path: str, tokenizer: str, rows: int, max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of the first rows, and the number of tokens of the tokenizer."""
    data = InstructionDataModule(path, tokenizer=tokenizer, batch_size=1, max_length=max_length, shuffle=False)
    data.setup("fit")
    batches = itertools.islice(data.train_dataloader(), rows)
    return [batch["input_ids"][0].tolist() for batch in batches], len(data.tokenizer)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", help="name of the served model; default: the only one")
    parser.add_argument("--tokenizer", default="asset:student", help="of student and teacher")
    parser.add_argument("--data", default="asset:train")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--requests", type=int, default=8, help="requests at a time")
    arguments = parser.parse_args(words)
    client = OpenAIClient(arguments.url, patience=30.0)
    rows, vocabulary = prompts(arguments.data, arguments.tokenizer, arguments.rows, arguments.max_length)
    scorer = PromptScorer(client, client.select_model(arguments.model), arguments.top_k)
    scorer = replace(scorer, dialect=detect_dialect(scorer, rows[0][:4]))
    print(
        f"# {scorer.model} at {client.url}\n\nform: {scorer.dialect.name}; "
        f"max_model_len: {client.max_length(scorer.model)}"
    )
    check_scores(scorer, rows[0], vocabulary, max(map(len, rows)))
    print(
        "test at the start: passed\n\n| requests at a time | rows | tokens | s | tokens per s |\n|---|---|---|---|---|"
    )
    found = []
    for requests in (1, arguments.requests):
        began = time.perf_counter()
        with ThreadPoolExecutor(requests) as pool:
            found.append(
                list(pool.map(lambda pair: scorer.score(pair[1], f"row {pair[0]}").entries(), enumerate(rows)))
            )
        seconds, tokens = time.perf_counter() - began, sum(map(len, rows))
        print(f"| {requests} | {len(rows)} | {tokens} | {seconds:.1f} | {tokens / seconds:.0f} |")
    pairs = [pair for one, other in zip(*found, strict=True) for pair in zip(one, other, strict=True)]
    noise = max(abs(one[t] - other[t]) for one, other in pairs for t in one.keys() & other.keys() if one[t] > -math.inf)
    mass = sum(math.fsum(map(math.exp, one.values())) for one, _ in pairs) / len(pairs)
    print(f"\nlargest difference of a log-probability between the two: {noise:.2e}; mass of the entries: {mass:.3f}")


if __name__ == "__main__":
    main()
