"""Answers to prompts of the command line, of one model or of several side by side: `kd-lightning generate --prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_lightning.console import printable
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.rows.teacher_input import TeacherInput
from kd_lightning.distributed.signals import StopRequest
from kd_lightning.generation.batch_generator import NumberedResponses
from kd_lightning.generation.local_model import LocalModel
from kd_lightning.generation.server_generator import ServerGenerator
from kd_lightning.models.generate import Sampling, stop_strings
from kd_lightning.models.openai_client import OpenAIClient

OF_FILES = ("data", "output", "batch_size", "progress")
"""Arguments of the command that say how a file is written."""


def print_answers(prompts: Sequence[str], models: Sequence[str], given: Mapping[str, Any]) -> int:
    """Print answers to prompts: that of one model to one prompt alone, more of them as a table.

    Args:
        prompts: texts.
        models: folders, hub or `asset:` names; names of served models.
        given: the other arguments of the command.

    Returns:
        0, the exit status.

    Raises:
        ValueError: `data` or `output` is given; see `answers_to`.
    """
    if unused := [name for name in ("data", "output") if given[name] is not None]:
        raise ValueError(f"--prompt prints answers: remove --{' and --'.join(unused)}")
    found = answers_to(prompts, models, **{name: value for name, value in given.items() if name not in OF_FILES})
    if len(prompts) == len(found) == 1:
        print(printable(next(iter(found.values()))[0]))
        return 0
    table = Table(show_lines=True)
    for heading in ("prompt", *found):
        table.add_column(Text(printable(heading)), overflow="fold")
    for cells in zip(prompts, *found.values(), strict=True):
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)
    return 0


def answers_to(
    prompts: Sequence[str],
    models: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    server: str | None = None,
    patience: float = 180.0,
    api_key_env: str = "OPENAI_API_KEY",
    chat_template_kwargs: dict[str, Any] | None = None,
    teacher_prompt: str | None = None,
    min_new_tokens: int = 0,
    stop: list[str] | None = None,
) -> dict[str, list[str]]:
    """The answers of each model to each prompt, by name of the model; arguments as those of `generate`.

    Raises:
        ValueError: an argument is out of its range; a model cannot be used; the server refuses or fails.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, min_new_tokens, stop_strings(stop))
    own = TeacherInput(teacher_prompt)
    rows = [(f"prompt {number}", {"prompt": text}) for number, text in enumerate(prompts, start=1)]
    questions = [own.conversation(parse_question(row, at), row, at) for at, row in rows]
    found: dict[str, list[str]] = {}
    if server is not None:
        names: Sequence[str | None] = models or [None]
        for name in names:
            client = OpenAIClient(server, patience, api_key_env=api_key_env)
            served = ServerGenerator(client, name, sampling, seed)
            found[served.model] = _texts(served.generate(questions, 0, len(questions), StopRequest()))
    elif not models:
        raise ValueError("model must be a folder, hub name or asset: name (or pass server), got None")
    for name in () if server is not None else models:
        local = LocalModel(name, sampling, seed, max_length, dtype, device, chat_template_kwargs)
        found[name] = _texts(local.responses(local.prompts(questions), 0, len(questions), StopRequest()))
    return found


def _texts(responses: NumberedResponses) -> list[str]:
    return [response.text for _, response in sorted(responses, key=lambda pair: pair[0])]
