"""Generate responses to a file of prompts: `kd-lightning generate --model M --data FILE --output OUT.jsonl`."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch

from kd_lightning.data.conversation import Conversation
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.rows.teacher_input import TeacherInput
from kd_lightning.data.sources import read_rows
from kd_lightning.data.text.prompt_notice import prompt_notice
from kd_lightning.data.text.rendering import date_of, today
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import load_tokenizer, with_template
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.distributed.signals import StopRequest, Terminated, exit_status, finish_on_signal, stop
from kd_lightning.generation.batch_generator import (
    BatchGenerator,
    NumberedResponses,
    batches_of_rank,
    length_batches,
    summary,
    write_responses,
)
from kd_lightning.generation.response_file import ResponseFile, check_output
from kd_lightning.generation.server_generator import ServerGenerator
from kd_lightning.models.generate import Sampling, stop_strings
from kd_lightning.models.loading import load_causal_lm
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
    parser = jsonargparse.ArgumentParser(
        prog="kd-lightning generate",
        description="Generate a response to every row of a file, with a model or a server.",
        usage="kd-lightning generate --model M --data FILE --output OUT.jsonl [--ARGUMENT VALUE ...]",
        exit_on_error=False,
    )
    parser.add_function_arguments(generate, skip={"stop"})
    about = "a text that ends a response, which does not contain it; several with several `--stop TEXT`"
    parser.add_argument(
        "--stop", action="append", type=str, metavar="TEXT", help=about
    )  # a text, not YAML: "###", "[1]"
    given = parser.parse_args(list(args)).as_dict()
    try:
        generate(**given)
    except (KeyboardInterrupt, Terminated) as end:
        _log(f"interrupted: run the same command again to resume {given['output']}")
        return exit_status(end)
    return 0


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


class LocalModel:
    """A model in this process, with its tokenizer and how its responses are sampled.

    Args:
        name: folder, hub name or `asset:` name.
        sampling: how responses are sampled.
        seed: of the samples.
        max_length: longest prompt and response together, in tokens; None: the model's number of positions.
        dtype: of the weights; auto: as saved.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        template_kwargs: variables for the chat template.
        date: YYYY-MM-DD, for templates that write the date; None: today's.

    Raises:
        ValueError: an argument is out of its range, or the model cannot be read.
    """

    def __init__(
        self,
        name: str,
        sampling: Sampling,
        seed: int,
        max_length: int | None,
        dtype: str,
        device: str,
        template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        target = _device(device)
        self.model = load_causal_lm(name, kwargs={"dtype": dtype}, role="model")
        tokenizer = load_tokenizer(name)
        with_template(tokenizer, None, _log)
        self.model.to(target)  # type: ignore[arg-type]  # transformers wraps the method without its types
        self.generator = BatchGenerator(self.model, tokenizer, sampling, seed)
        longest = sampling.max_prompt_tokens(self.model, max_length)
        self.text = TextTokenizer(tokenizer, None, template_kwargs, longest, date=date or today())

    def fingerprint(self) -> str:
        """A hash that changes with any weight, with the end-of-sequence tokens, and with how prompts are tokenized."""
        model = self.model
        weights = tensor_digest(itertools.chain(model.named_parameters(), model.named_buffers()))
        parts = [weights, str(model.generation_config.eos_token_id), self.text.fingerprint()]
        return f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"

    def dated(self) -> dict[str, str]:
        """The date of the prompts as a setting, if the chat template writes one."""
        date = self.text.written_date
        return {} if date is None else {"date": date}

    def prompts(self, questions: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of the prompts; logs how many are truncated.

        Raises:
            ValueError: a prompt is empty.
        """
        prompts = [self.text.prompt(question)[1] for question in questions]
        if notice := prompt_notice(self.text, questions):
            _log(notice)
        longest = self.text.max_length
        if full := sum(len(prompt) == longest for prompt in prompts):
            _log(f"{full} prompts have {longest} tokens or more: only the last {longest} tokens are kept")
        if empty := [number for number, prompt in enumerate(prompts, start=1) if not prompt]:
            raise ValueError(f"row {empty[0]} has an empty prompt")
        return prompts

    def responses(
        self, prompts: Sequence[list[int]], done: int, batch_size: int, request: StopRequest
    ) -> NumberedResponses:
        """Responses with the numbers of their rows, without the first `done` rows, up to a request to stop."""
        plan = length_batches([len(prompt) for prompt in prompts], batch_size)
        return self.generator.generate(prompts, request.until_requested(batches_of_rank(plan, done)))


def _date_of_output(output: str) -> str | None:
    """The date in the first line of an output that is resumed; None if there is none."""
    path = Path(output)
    try:
        with path.open("rb") as file:
            date = json.loads(file.readline())["sampling"]["date"]
        return f"{date_of(date):%Y-%m-%d}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a new output, or one that is refused later
        return None


def _device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be auto, cpu or a device of this machine, got {name!r}: {error}") from None
    return device


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
