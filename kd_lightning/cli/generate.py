"""Generate responses to a file of prompts: `kd-lightning generate --model M --data FILE --output OUT.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from kd_lightning.cli.answers import print_answers
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.rows.teacher_input import TeacherInput
from kd_lightning.data.sources import read_rows
from kd_lightning.data.text.rendering import date_of
from kd_lightning.distributed.signals import StopRequest, Terminated, exit_status, finish_on_signal, stop
from kd_lightning.generation.batch_generator import (
    NumberedResponses,
    summary,
    write_responses,
)
from kd_lightning.generation.local_model import LocalModel
from kd_lightning.generation.response_file import ResponseFile, check_output
from kd_lightning.generation.server_generator import ServerGenerator
from kd_lightning.models.generate import Sampling, stop_strings
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.paths import expand_path
from kd_lightning.reporting.redaction import print_message


def main(args: Sequence[str]) -> int:
    """Run `generate` with the arguments of the command line.

    Args:
        args: arguments after the command.

    Returns:
        0; 130 after Ctrl-C and 143 after SIGTERM, which finish the batch, or the requests that are sent.

    Raises:
        ValueError: see `generate`.
    """
    given = _parser().parse_args(list(args)).as_dict()
    prompts, models = given.pop("prompt"), given.pop("model") or []
    if prompts:
        return print_answers(prompts, models, given)
    for name in ("data", "output"):
        if given[name] is None:
            raise ValueError(f"--{name} is missing: pass --data FILE and --output OUT.jsonl, or --prompt TEXT")
    given["model"] = models[-1] if models else None  # as with every argument, the last one counts
    try:
        generate(**given)
    except (KeyboardInterrupt, Terminated) as end:
        _log(f"interrupted: run the same command again to resume {given['output']}")
        return exit_status(end)
    return 0


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="kd-lightning generate",
        description="Generate a response to every row of a file, or print answers to prompts.",
        usage="kd-lightning generate --model M {--data FILE --output OUT.jsonl | --prompt TEXT} [--ARGUMENT VALUE ...]",
        exit_on_error=False,
    )
    about = "print the answer to a text; several with several `--prompt TEXT`, and of models with several `--model M`"
    parser.add_argument("--prompt", action="append", type=str, metavar="TEXT", help=about)
    parser.add_argument("--data", type=str | None, help="anything that `InstructionDataModule` reads")
    parser.add_argument("--output", type=str | None, help="a `.jsonl` file; never replaced")
    about = "folder, hub name or `asset:` name; with `--server`, the served model, optional if it is the only one"
    parser.add_argument("--model", action="append", type=str, metavar="M", help=about)
    about = "a text that ends a response, which does not contain it; several with several `--stop TEXT`"
    parser.add_argument(
        "--stop", action="append", type=str, metavar="TEXT", help=about
    )  # a text, not YAML: "###", "[1]"
    parser.add_function_arguments(generate, skip={"stop", "data", "output", "model"})
    return parser


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
    api_key_env: str = "OPENAI_API_KEY",
    progress: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    teacher_prompt: str | None = None,
    min_new_tokens: int = 0,
    stop: list[str] | None = None,
) -> None:
    """Write a response to every row of the data, in its order, with all fields of the row.

    A line has its row's fields, `model` (a hash, or the served model's name), `sampling`, `finish_reason` ("eos",
    "stop" or "length") and `response`. The same call again resumes; an output of other settings or rows is refused.

    Args:
        data: anything that `InstructionDataModule` reads; answers are optional and ignored.
        output: a `.jsonl` file; never replaced.
        model: folder, hub name or `asset:` name; with `server`, the served model, optional if it is the only one.
        max_new_tokens: longest response in tokens, at least 1.
        temperature: sampling temperature; 0: greedy.
        top_p: sample from the most probable tokens that together have this probability, in (0, 1].
        batch_size: rows per batch, at least 1; with `server`: concurrent requests.
        seed: seed of the samples.
        max_length: longest prompt and response, in tokens; a longer prompt keeps its last. None: what the model reads.
        dtype: of the weights, such as float32; auto: as saved.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        server: address of an OpenAI-compatible server that generates instead of a local model.
        patience: seconds during which requests to a server that does not answer are retried.
        api_key_env: name of the environment variable that holds the server's key; `OPENAI_API_KEY` may be unset.
        progress: show a progress bar.
        chat_template_kwargs: variables for the chat template of a local model, such as those of the training data.
        teacher_prompt: what the model reads as the last user turn, as `data.teacher_prompt` of a run; None: that turn.
        min_new_tokens: the end of sequence cannot be one of the first `min_new_tokens` tokens.
        stop: texts that end a response, which does not contain them.

    Raises:
        ValueError: an argument is out of its range; data, model or output cannot be used; the server refuses or fails.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, min_new_tokens, stop_strings(stop))
    output = _checked_output(output, model or server, batch_size=batch_size, max_length=max_length, patience=patience)
    rows, questions = _questions(data, TeacherInput(teacher_prompt))
    settings = {**sampling.settings(), "seed": seed, **({} if teacher_prompt is None else {"prompt": teacher_prompt})}
    if server is not None:
        served = ServerGenerator(OpenAIClient(server, patience, api_key_env=api_key_env), model, sampling, seed)
        return _ask(served, questions, output, rows, settings, batch_size, progress)
    date = _date_of_output(output)
    local = LocalModel(str(model), sampling, seed, max_length, dtype, device, chat_template_kwargs, date)
    _generate(local, questions, output, rows, {**settings, "batch_size": batch_size}, progress)


def _questions(data: str, own: TeacherInput) -> tuple[list[dict[str, Any]], list[Conversation]]:
    """The rows, and what a model is asked about each."""
    found = list(read_rows(data, "train"))
    return [row for _, row in found], [own.conversation(parse_question(row, at), row, at) for at, row in found]


def _ask(
    served: ServerGenerator,
    questions: Sequence[Conversation],
    output: str,
    rows: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    requests: int,
    progress: bool,
) -> None:
    with ResponseFile(output, rows, f"{served.model} (server)", settings) as file:
        _write(file, lambda request: served.generate(questions, file.done, requests, request), progress)


def _generate(
    local: LocalModel,
    questions: Sequence[Conversation],
    output: str,
    rows: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    progress: bool,
) -> None:
    prompts = local.prompts(questions)
    with ResponseFile(output, rows, local.fingerprint(), {**settings, **local.dated()}) as file:
        _write(file, lambda request: local.responses(prompts, file.done, settings["batch_size"], request), progress)


def _checked_output(output: str, generator: str | None, **numbers: float | None) -> str:
    """The expanded path of the output; refuses too small numbers, another suffix than `.jsonl`, and a missing model."""
    output = expand_path(output)
    least = {"batch_size": 1, "max_length": 2, "patience": 0}
    for name, value in numbers.items():
        if value is not None and value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
    if Path(output).suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"output must be a .jsonl file, got {output!r}")
    check_output(Path(output))
    if generator is None:
        raise ValueError("model must be a folder, hub name or asset: name (or pass server), got None")
    return output


def _date_of_output(output: str) -> str | None:
    """The date in the first line of an output that is resumed; None if there is none."""
    path = Path(output)
    try:
        with path.open("rb") as file:
            date = json.loads(file.readline())["sampling"]["date"]
        return f"{date_of(date):%Y-%m-%d}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a new output, or one that is refused later
        return None


def _write(file: ResponseFile, responses: Callable[[StopRequest], NumberedResponses], progress: bool) -> None:
    """Write the responses that are missing, and log a summary.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed and the file is incomplete.
        Terminated: the same after SIGTERM.
    """
    if file.done == len(file.rows):
        _log(f"{file.path} is complete already: {summary(file.responses)}")
        return
    if file.done:
        _log(f"{file.path}: resuming after {file.done} of {len(file.rows)} responses")
    with finish_on_signal(f"interrupted: finishing what is being generated, then closing {file.path}") as request:
        _log(f"{file.path}: {write_responses(file, responses(request), progress)}")
    if request.signal and file.done < len(file.rows):
        raise stop(request.signal)


def _log(text: str) -> None:
    print_message(text, sys.stderr)
