"""A teacher behind a server: what a step costs beside it, and how many log-probabilities the client reads.

    python benchmarks/served.py --output benchmarks/results/served

A server in another process answers from memory after a settable latency, and sleeps meanwhile, so that it takes no CPU
from the step. The bundled student trains on the bundled rows: with the same answers from a cache (the step alone),
without training (the server alone), and with the server (both), for latencies below, at, and above the step; the same
with the bundled teacher's model as the student, whose step is longer than the reading of its answers. Then the client
alone reads answers for prompts of 512 tokens, with k = 20. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from measuring import machine, write
from torch import Tensor

from kd_lightning import DistillationModule
from kd_lightning.data import InstructionDataModule
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.models.scoring.scorer import PromptScorer
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.served import ServerTeacher
from kd_lightning.teachers.server_answers import as_top_k

STUDENTS = ("asset:student", "asset:teacher")
SHARES = (0.5, 1.0, 2.0)
"""Latencies, as multiples of the step."""
REQUESTS = (1, 8, 32)
K = 20


# ------------------------------------------------------------------------------------------------------------- a server
def serve(synthetic: bool) -> None:
    """Answer until the process is killed; the first line of the output is the port."""
    model = None if synthetic else load_causal_lm("asset:teacher", kwargs={"dtype": "float32"}, role="teacher").eval()
    settings = {"latency": 0.0}

    @functools.cache
    def answer(ids: tuple[int, ...], k: int) -> bytes:
        if model is None:
            numbers = random.Random(len(ids) + ids[0])
            entries = [{token: -3.0 - numbers.random() for token in numbers.sample(range(32000), k)} for _ in ids]
        else:
            with torch.no_grad():
                best = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            entries = [dict(zip(*(x.tolist() for x in row.topk(k)[::-1]), strict=True)) for row in best]
            entries = [{**entry, t: float(row[t])} for entry, row, t in zip(entries, best, [*ids[1:], 0], strict=True)]
        for entry, token in zip(entries, ids[1:], strict=False):
            entry.setdefault(token, -9.0)
        rows = [{str(t): {"logprob": v, "rank": 1, "decoded_token": ""} for t, v in e.items()} for e in entries[:-1]]
        return json.dumps({"choices": [{"text": "", "prompt_logprobs": [None, *rows]}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(b'{"data": [{"id": "teacher", "max_model_len": 4096}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "latency" in body:
                settings.update(body)
                self.reply(b"{}")
                return
            content = answer(tuple(body["prompt"]), body["prompt_logprobs"])
            time.sleep(settings["latency"])
            self.reply(content)

        def reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.listen(128)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def server_process(*words: str) -> Iterator[str]:
    """The address of a server in another process."""
    command = [sys.executable, __file__, "--serve", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def set_latency(url: str, seconds: float) -> None:
    request = urllib.request.Request(f"{url}/latency", json.dumps({"latency": seconds}).encode())
    urllib.request.urlopen(request).read()


# --------------------------------------------------------------------------------------------------------------- a step
class Clock(L.Callback):
    """Wall and CPU seconds between the ends of two steps."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Take the time."""
        self.marks.append((time.perf_counter(), time.process_time()))


def data_of(batch: int) -> InstructionDataModule:
    return InstructionDataModule("asset:train", tokenizer="asset:student", batch_size=batch, max_length=96, seed=1)


def trained(teacher: Teacher, student: str, batch: int, steps: int) -> tuple[float, float]:
    """Median wall and CPU seconds of a step."""
    clock = Clock()
    module = DistillationModule(student, teacher=teacher)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps + 2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[clock],
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(batch))
    marks = clock.marks[1:]
    pairs = list(itertools.pairwise(marks))
    return tuple(statistics.median(b[n] - a[n] for a, b in pairs) for n in (0, 1))  # type: ignore[return-value]


def first_batches(batch: int, steps: int) -> tuple[InstructionDataModule, list[dict[str, Tensor]]]:
    """The data, and the batches of the first steps."""
    data = data_of(batch)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return data, [next(loader) for _ in range(steps + 2)]


def attached(teacher: Teacher, data: InstructionDataModule) -> Teacher:
    module = DistillationModule("asset:student", teacher=teacher)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.datamodule = data  # type: ignore[attr-defined]
    module.configure_model()
    return teacher


def step_beside_a_server(student: str, batch: int, steps: int) -> dict[str, Any]:
    """Wall and CPU seconds of the step alone, of the server alone, and of both."""
    found: dict[str, Any] = {"student": student, "batch": batch, "rows": []}
    with server_process() as url, tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"top_k": K, "requests": batch}
        data, batches = first_batches(batch, steps)
        teacher = attached(ServerTeacher(url, **settings), data)
        fill_cache(Path(folder) / "cache", teacher, data, 2048, kind="top_k", k=K, dtype="float32", bar=False)
        cached = lambda: CachedTeacher(str(Path(folder) / "cache"))  # noqa: E731
        trained(cached(), student, batch, 4)  # warm
        found["alone"] = trained(cached(), student, batch, steps)
        for share in (0.0, *SHARES):
            set_latency(url, share * found["alone"][0])
            asked = attached(ServerTeacher(url, **settings), data)
            waits = []
            for one in batches:
                began = time.perf_counter()
                asked.logits(one)
                waits.append(time.perf_counter() - began)
            row = {"latency": share * found["alone"][0], "server": statistics.median(waits)}
            row["step"] = trained(cached(), student, batch, steps)  # again, as the machine may be shared
            row["both"] = trained(ServerTeacher(url, **settings), student, batch, steps)
            found["rows"].append(row)
    return found


# ----------------------------------------------------------------------------------------------------------- the client
def client_throughput(rows: int, length: int) -> dict[str, Any]:
    """Tokens per second, and CPU seconds per 1,000 tokens, of reading answers into a top k."""
    numbers = random.Random(3)
    prompts = [[numbers.randrange(32000) for _ in range(length)] for _ in range(rows)]
    found: dict[str, Any] = {"rows": rows, "length": length, "k": K}
    with server_process("--synthetic") as url:
        scorer = PromptScorer(OpenAIClient(url), "teacher", K).in_process()

        def read(ids: list[int]) -> None:
            as_top_k(scorer.score(ids, "a row"), torch.tensor(ids[1:]), K, 32000)

        list(map(read, prompts))  # the server makes its answers
        for requests in REQUESTS:
            with ThreadPoolExecutor(requests) as pool:
                wall, cpu = time.perf_counter(), time.process_time()
                list(pool.map(read, prompts))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            tokens = rows * (length - 1)
            found[str(requests)] = {"tokens_per_s": tokens / wall, "cpu_per_1000": 1000 * cpu / tokens}
    return found


# ----------------------------------------------------------------------------------------------------------- the report
def report(record: dict[str, Any]) -> str:
    """Two tables."""
    client = record["client"]
    lines = [
        f"{record['machine']}. {record['steps'][0]['batch']} rows a step, as many requests at a time, k = {K}; "
        "milliseconds, medians. The server sleeps; its time alone includes reading its answers. Load of the machine: "
        f"{record['load']:.1f}.",
        "",
        "| student | latency | step alone (answers from a cache) | server alone | both | both / larger | both / sum | "
        "CPU of the step's process, both / alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step in record["steps"]:
        for row in step["rows"]:
            alone, server, both = row["step"][0], row["server"], row["both"][0]
            cells = [1e3 * row["latency"], 1e3 * alone, 1e3 * server, 1e3 * both]
            ratios = [both / max(alone, server), both / (alone + server), row["both"][1] / row["step"][1]]
            texts = [step["student"], *(f"{x:.0f}" for x in cells), *(f"{x:.2f}" for x in ratios)]
            lines.append("| " + " | ".join(texts) + " |")
    lines += [
        "",
        f"The client alone: {client['rows']} prompts of {client['length']} tokens, k = {K}, answers from memory.",
        "",
        "| requests at a time | tokens per s | CPU ms per 1,000 tokens |",
        "|---|---|---|",
        *(
            f"| {n} | {client[str(n)]['tokens_per_s']:,.0f} | {1e3 * client[str(n)]['cpu_per_1000']:.0f} |"
            for n in REQUESTS
        ),
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--synthetic", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("build/served"))
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=96, help="prompts of the client alone")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    given = parser.parse_args(words)
    if given.serve:
        serve(given.synthetic)
    torch.set_num_threads(1)
    record = {
        "machine": machine(1),
        "load": os.getloadavg()[0],
        "client": client_throughput(given.rows, given.length),
        "steps": [step_beside_a_server(student, given.batch, given.steps) for student in STUDENTS],
    }
    text = report(record)
    write(given.output, record, text)
    print(text)
    assert all(math.isfinite(row["both"][0]) for step in record["steps"] for row in step["rows"])


if __name__ == "__main__":
    main()
