r"""Speed of `kd-lightning generate` relative to bare `model.generate` on the same batches, and to other variants.

CPU seconds per token. All variants generate the same greedy responses, up to the end token or `--new` tokens; ours also
writes them to a file. Every round is a separate process in which the variants take turns after model and rows are
loaded, so that a slowdown of the machine affects all of them alike. `--ways` chooses the variants: a static cache, with
and without compilation, and the continuous batching of transformers are bare too; a stop string that no response
contains shows what looking for it costs. `--model wide` is a Llama with random
weights, 4 layers and a hidden size of 512, whose responses do not end early.

    python benchmarks/generate.py --rows 256 --rounds 5 --output build/generate
    python benchmarks/generate.py --model wide --rows 64 --turns 1 --output build/generate_wide \
        --ways ours bare "static cache" "static cache, compiled" "continuous batching"

writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import in_a_process, machine, spread, write
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from kd_lightning.data.collate import left_pad
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import TextTokenizer, load_tokenizer
from kd_lightning.generation.batch_generator import BatchGenerator, batches_of_rank, length_batches, write_responses
from kd_lightning.generation.response_file import ResponseFile
from kd_lightning.models.generate import Sampling
from kd_lightning.models.hf_adapter import eos_token_ids
from kd_lightning.models.loading import load_causal_lm

WAYS = ("ours", "bare", "one by one", "ours, file order")
OTHERS = ("static cache", "static cache, compiled", "continuous batching", "ours, stop string")
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}


class Bench:
    """A model and prompts, and the functions to measure: each responds to all rows and returns their tokens.

    Args:
        model: folder, hub name or `asset:` name, or `wide`.
        rows: number of rows: half of them with a context in the prompt, which makes it longer.
        batch_size: rows per batch.
        new: most tokens of a response.
    """

    def __init__(self, model: str, rows: int, batch_size: int, new: int) -> None:
        name = "asset:teacher" if model == "wide" else model
        self.tokenizer = load_tokenizer(name)
        text = TextTokenizer(self.tokenizer)
        short, long = (list(read_rows(f"asset:{file}", "train"))[: rows // 2] for file in ("train", "context_train"))
        found = [row for pair in zip(short, long, strict=True) for row in pair]
        self.rows = [row for _, row in found]
        self.prompts = [text.prompt(parse_question(row, place))[1] for place, row in found]
        self.model: Any = load_causal_lm(name, kwargs={"dtype": "float32"}, role="model")
        if model == "wide":
            torch.manual_seed(0)
            config = LlamaConfig(**{**self.model.config.to_dict(), **WIDE, "head_dim": None, "num_key_value_heads": 4})
            wide = LlamaForCausalLM(config).eval()
            wide.generation_config = self.model.generation_config
            self.model = wide
        self.batch_size, self.new = batch_size, new
        self.eos = eos_token_ids(self.model)

    def call(self, way: str) -> Callable[[], list[list[int]] | int]:
        """The function of a variant."""
        if way == "continuous batching":
            return self.continuous
        if way.startswith("ours"):
            return functools.partial(self.ours, self.plan(way), ("###",) if way.endswith("stop string") else ())
        options: dict[str, Any] = {"cache_implementation": "static"} if way.startswith("static") else {}
        if way.endswith("compiled"):
            options["compile_config"] = CompileConfig(fullgraph=False, dynamic=True, mode="default")
            options["compile_config"]._compile_all_devices = True  # transformers compiles on GPUs only
        return functools.partial(self.bare, self.plan(way), options)

    def plan(self, way: str) -> list[list[int]]:
        """The batches of a variant."""
        if way == "ours, file order":
            starts = range(0, len(self.prompts), self.batch_size)
            return [list(range(len(self.prompts)))[start : start + self.batch_size] for start in starts]
        return length_batches([len(prompt) for prompt in self.prompts], 1 if way == "one by one" else self.batch_size)

    def bare(self, plan: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        """`model.generate`, batch by batch; the responses in file order."""
        pad, found = self.tokenizer.pad_token_id, {}
        for batch in plan:
            inputs = left_pad([self.prompts[row] for row in batch], pad)
            made = self.model.generate(**inputs, max_new_tokens=self.new, do_sample=False, pad_token_id=pad, **options)
            found |= dict(zip(batch, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True))
        return [self.cut(found[row]) for row in range(len(self.prompts))]

    def continuous(self) -> list[list[int]]:
        """`model.generate_batch`: no padding, and a row that ends makes room for another one."""
        pad = self.tokenizer.pad_token_id
        generation = GenerationConfig(max_new_tokens=self.new, do_sample=False, eos_token_id=self.eos, pad_token_id=pad)
        config = ContinuousBatchingConfig(page_size=32, num_blocks=256, max_batch_tokens=512)
        found = self.model.generate_batch(self.prompts, generation, config)
        return [self.cut(response.generated_tokens) for response in found.values()]

    def cut(self, ids: list[int]) -> list[int]:
        """A response up to and including its end token."""
        ends = [place for place, token in enumerate(ids) if token in self.eos]
        return ids[: ends[0] + 1] if ends else ids

    def ours(self, plan: list[list[int]], stop: tuple[str, ...]) -> int:
        """`kd-lightning generate` without loading; the number of tokens."""
        writer = BatchGenerator(self.model, self.tokenizer, Sampling(self.new, 0.0, stop=stop))
        with tempfile.TemporaryDirectory() as folder:
            with ResponseFile(Path(folder) / "out.jsonl", self.rows, "m", {}) as file:
                write_responses(file, writer.generate(self.prompts, batches_of_rank(plan)), bar=False)
                return sum(response.tokens for response in file.responses)


def measure(words: argparse.Namespace) -> None:
    """One round: CPU seconds and tokens of every variant, after a warm-up call; the variants take turns."""
    torch.set_num_threads(words.threads)
    bench = Bench(words.model, words.rows, words.batch_size, words.new)
    ways = {way: bench.call(way) for way in words.ways}
    expected = bench.bare(bench.plan("bare"), {})
    tokens, equal, first = {}, {}, {}
    for way, call in ways.items():
        began = time.process_time()
        found = call()
        first[way] = time.process_time() - began
        tokens[way] = found if isinstance(found, int) else sum(map(len, found))
        equal[way] = None if isinstance(found, int) else sum(a == b for a, b in zip(expected, found, strict=True))
    seconds: dict[str, list[float]] = {way: [] for way in words.ways}
    for _ in range(words.turns):
        for way, call in ways.items():
            began = time.process_time()
            call()
            seconds[way].append(time.process_time() - began)
    print(json.dumps({"tokens": tokens, "equal": equal, "first": first, "seconds": seconds}))


def table(rounds: list[dict[str, Any]]) -> str:
    """Tokens per CPU second of every variant, and the speed of ours relative to it, turn by turn."""
    lines = [
        "| variant | tokens per CPU second | ours / variant | equal responses | CPU seconds of the first call |",
        "|---|---|---|---|---|",
    ]
    rates = {
        way: [one["tokens"][way] / seconds for one in rounds for seconds in one["seconds"][way]]
        for way in rounds[0]["tokens"]
    }
    for way, found in rates.items():
        ratio = [a / b for a, b in zip(rates["ours"], found, strict=True)]
        equal = min(one["equal"][way] for one in rounds) if rounds[0]["equal"][way] is not None else None
        shown = f"{rounds[0]['tokens'][way]} tokens" if equal is None else f"{equal}"
        first = spread([one["first"][way] for one in rounds], 1)
        lines.append(f"| {way} | {spread(found, 0)} | {spread(ratio)} | {shown} | {first} |")
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="asset:teacher", help="also `wide`")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=(*WAYS, *OTHERS))
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
    shared = [*(f"--{name}={getattr(words, name)}" for name in names), "--ways", *words.ways]
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
