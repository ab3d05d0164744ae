"""Responses of a model to a file of prompts: `kd-lightning generate --model M --data FILE --output OUT.jsonl`."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import torch

from kd_lightning.data.conversation import Conversation
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import TextTokenizer, load_tokenizer, with_template
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.generation.batch_generator import (
    BatchGenerator,
    batches_of_rank,
    length_batches,
    summary,
    write_responses,
)
from kd_lightning.generation.response_file import ResponseFile
from kd_lightning.generation.server_generator import ServerGenerator
from kd_lightning.models.generate import Sampling
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.openai_client import OpenAIClient


def main(args: Sequence[str]) -> int:
    """Run `generate` with what the words say.

    Args:
        args: words of the command line after the command.

    Returns:
        0; 130 where it was interrupted from the keyboard.

    Raises:
        ValueError: what `generate` raises.
    """
    parser = jsonargparse.ArgumentParser(
        prog="kd-lightning generate",
        description="A response of a model, or of a server, to every row of a file.",
        usage="kd-lightning generate --model M --data FILE --output OUT.jsonl [--ARGUMENT VALUE ...]",
        exit_on_error=False,
    )
    parser.add_function_arguments(generate)
    given = parser.parse_args(list(args)).as_dict()
    try:
        generate(**given)
    except KeyboardInterrupt:
        _say(f"interrupted: the same command goes on with {given['output']}")
        return 130
    return 0


def _place(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: there is none of that name here.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=place).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be auto, cpu or one that torch finds here, got {name!r}: {error}") from None
    return place


def generate(
    data: str,
    output: str,
    model: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    server: str | None = None,
    patience: float = 180.0,
    progress: bool = True,
) -> None:
    """Write a response to every row of the data, in its order, with all of the row's fields.

    A line of the output has the fields of its row, then `model` (a digest of weights and tokenizer, or the name a
    server knows it by), `sampling`, `finish_reason` ("eos" or "length") and `response`. Interrupted at any moment and
    called again, it goes on, and every response is what it would have been; an output that holds anything else, other
    settings or other rows, is refused. Where the output is finished nothing is done.

    Args:
        data: what `InstructionDataModule` reads; a row needs no answer, and one that is there is left out.
        output: a `.jsonl` file; never replaced.
        model: folder, hub name or `asset:` name; with `server`: the name it serves, not needed if that is the only one.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling; 0: the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this mass, in (0, 1].
        batch_size: rows that are answered together, at least 1; with `server`: requests under way.
        seed: of the samples.
        max_length: longest prompt and response together; of a longer prompt the last tokens are kept. None: as many as
            the model has places for.
        dtype: of the weights, such as float32 or bfloat16; auto: what they are saved in.
        device: cpu, cuda, cuda:1 …; auto: a GPU where there is one.
        server: address of an OpenAI-compatible server that answers in the model's place.
        patience: seconds for which a server that does not answer is asked again.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of its range; data or model cannot be read; the output holds something else; the
            server refuses, is gone, or answers nonsense.
    """
    how = Sampling(max_new_tokens, temperature, top_p)
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2), ("patience", patience, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if Path(output).suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"output must be a .jsonl file, got {output!r}")
    if model is None and server is None:
        raise ValueError("model must be a folder, hub name or asset: name (or give server), got None")
    found = list(read_rows(data, "train"))
    rows, questions = [row for _, row in found], [parse_question(row, place) for place, row in found]
    sampling = {**asdict(how), "seed": seed}
    if server is not None:
        served = ServerGenerator(OpenAIClient(server, patience), model, how, seed)
        with ResponseFile(output, rows, f"{served.model} (server)", sampling) as file:
            _finish(file, lambda: served.generate(questions, file.done, batch_size), progress)
        return
    place = _place(device)
    network: Any = load_causal_lm(str(model), kwargs={"dtype": dtype}, role="model")
    tokenizer = load_tokenizer(str(model))
    with_template(tokenizer, None, _say)
    writer = BatchGenerator(network.to(place), tokenizer, how, seed)
    text = TextTokenizer(tokenizer, max_length=how.max_prompt_tokens(network, max_length))
    prompts = _prompts(text, questions)
    name = fingerprint(network, text)
    with ResponseFile(output, rows, name, {**sampling, "batch_size": batch_size}) as file:
        plan = length_batches([len(prompt) for prompt in prompts], batch_size)
        _finish(file, lambda: writer.generate(prompts, batches_of_rank(plan, file.done)), progress)


def _finish(file: ResponseFile, answers: Any, progress: bool) -> None:
    if file.done == len(file.rows):
        _say(f"{file.path} is finished already: {summary(file.responses)}")
        return
    if file.done:
        _say(f"{file.path}: {file.done} of {len(file.rows)} responses are there, going on")
    _say(f"{file.path}: {write_responses(file, answers(), progress)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def fingerprint(model: Any, tokenizer: TextTokenizer) -> str:
    """A text that changes with any weight, with the tokens that end a response, and with how prompts become tokens."""
    weights = tensor_digest(itertools.chain(model.named_parameters(), model.named_buffers()))
    parts = [weights, str(model.generation_config.eos_token_id), tokenizer.fingerprint()]
    return f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"


def _prompts(tokenizer: TextTokenizer, questions: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of the prompts; those that are too long are counted."""
    prompts = [tokenizer.prompt(question)[1] for question in questions]
    longest = tokenizer.max_length
    if full := sum(len(prompt) == longest for prompt in prompts):
        _say(f"{full} prompts have {longest} tokens or more; of longer ones the last {longest} are kept")
    if empty := [number for number, prompt in enumerate(prompts, start=1) if not prompt]:
        raise ValueError(f"row {empty[0]} has an empty prompt")
    return prompts
