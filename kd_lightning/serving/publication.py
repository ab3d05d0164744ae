"""How weights reach a server: an adapter is loaded at run time, or an exported folder by a command of the user."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_lightning.atomic_io import atomic_folder
from kd_lightning.distributed.dtensor import full_state_dict, full_tensor
from kd_lightning.models.hf_adapter import is_peft_model
from kd_lightning.models.lora import save_adapter, save_plain_model
from kd_lightning.models.openai_client import OpenAIClient, RequestRefusedError
from kd_lightning.reporting.redaction import redact_text

if TYPE_CHECKING:  # importing peft takes a second
    from peft import PeftModel

VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
KEPT = 2
"""Adapters that stay loaded: requests to the one before the newest may not be answered yet."""


def split_command(command: str | Sequence[str] | None) -> list[str] | None:
    """The arguments of a command, which runs without a shell.

    Raises:
        ValueError: it is empty, or a quote is not closed.
    """
    if command is None:
        return None
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except ValueError as error:
        raise ValueError(f"reload_command is not a command ({error}): close its quotes, or pass a list") from None
    if not words or not words[0].strip():
        raise ValueError("reload_command must have a program, got an empty command")
    return words


def check_publishable(student: PreTrainedModel, command: Sequence[str] | None) -> None:
    """Check that there is a way for a student's weights to reach a server.

    Raises:
        ValueError: there is none; the message has both.
    """
    if command is None and not is_peft_model(student):
        raise ValueError(
            "the student's weights all learn, and the server must be given them before it writes: pass reload_command, "
            "a command that makes it serve the folder {folder}, or train adapters (--model.lora.r 16), which vLLM "
            f"loads at run time if it is started with {VARIABLE}=True and --enable-lora"
        )


def published_state(student: PreTrainedModel, merged: bool, keep: bool) -> dict[str, Tensor]:
    """The full tensors that are published, on the CPU. A collective: all ranks must call it.

    Args:
        student: the model.
        merged: all tensors; False: those of its adapters.
        keep: whether this rank needs the result; False: it is empty.
    """
    if merged:
        return full_state_dict(student, keep)
    found: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            tensor = full_tensor(parameter.detach())
            if keep:
                found[name] = tensor.cpu()
    return found


class AdapterPublisher:
    """Loads adapters into a server at run time, by the endpoints of vLLM.

    Args:
        client: of the server.
    """

    def __init__(self, client: OpenAIClient) -> None:
        self._client = client
        self._loaded: list[tuple[str, Path]] = []

    def load(self, student: PreTrainedModel, state: Mapping[str, Tensor], name: str, folder: Path) -> str:
        """Save an adapter and load it; the name of the served model that has it.

        Args:
            student: the model with the adapter.
            state: the full tensors of the adapter by name.
            name: of the adapter.
            folder: where it is saved; the server reads it at the same path.

        Raises:
            ValueError: the server refuses or does not answer.
        """
        with atomic_folder(folder) as part:
            save_adapter(cast("PeftModel", student), state, part)
            for file in part.iterdir():
                shutil.copymode(part / "adapter_config.json", file)  # the server may be another user
        if name not in self._client.models():
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, f"adapter {name}")
            listed = self._client.models()
            if listed and name not in listed:
                raise ValueError(
                    f"server {self._client.url} has accepted adapter {name}, but does not serve a model of that name: "
                    f"{_start_vllm()}"
                )
        self._loaded.append((name, folder))
        return name

    def remove_old(self) -> None:
        """Unload the adapters before the two newest, and delete their folders."""
        while len(self._loaded) > KEPT:
            name, folder = self._loaded.pop(0)
            try:
                self._post("unload_lora_adapter", {"lora_name": name}, f"to unload adapter {name}")
            except ValueError as error:
                rank_zero_info(f"{error}: it stays loaded")
            shutil.rmtree(folder, ignore_errors=True)

    def _post(self, path: str, body: Mapping[str, str], what: str) -> None:
        try:
            self._client.request(path, body, lambda text: None, what, text=True)
        except RequestRefusedError as error:
            raise ValueError(f"{error}: {_start_vllm()}") from None


class FolderPublisher:
    """Exports the model and runs a command that makes the server load it.

    Args:
        command: its arguments, with `{folder}` and `{step}`.
        timeout: seconds for the command.
    """

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self._command = command
        self._timeout = timeout
        self._exported: list[Path] = []

    def load(
        self,
        student: PreTrainedModel,
        state: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        step: int,
        folder: Path,
    ) -> None:
        """Export the model and run the command.

        Args:
            student: the model.
            state: its full tensors by name.
            tokenizer: its tokenizer.
            step: for the command.
            folder: where the model is saved.

        Raises:
            ValueError: the command cannot be started, fails, or takes too long.
        """
        save_plain_model(student, tokenizer, folder, state)
        values = {"{folder}": str(folder), "{step}": str(step)}
        run_command([_filled(word, values) for word in self._command], self._timeout)
        self._exported.append(folder)

    def remove_old(self) -> None:
        """Delete the folders before the newest."""
        newest = self._exported[-1]
        for folder in self._exported[:-1]:
            if folder != newest:
                shutil.rmtree(folder, ignore_errors=True)
        self._exported = [newest]


def run_command(command: Sequence[str], timeout: float) -> None:
    """Run a command, without a shell, until it ends; processes that it leaves behind continue.

    Args:
        command: program and arguments.
        timeout: seconds.

    Raises:
        ValueError: it cannot be started, fails, or takes longer; the message has the last line of its output.
    """
    begin = f"reload_command ({command[0]})"
    with tempfile.TemporaryFile() as output:  # a pipe would stay open for as long as a server that it has started
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise ValueError(f"{begin} cannot be started: {error.strerror}") from None
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{begin} has not ended after {timeout:g} s (reload_timeout) and was stopped{_last_line(output)}"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            raise ValueError(f"{begin} failed with status {status}{_last_line(output)}")


def _last_line(output: object) -> str:
    """The last line of a command's output, for a message."""
    file = cast("tempfile._TemporaryFileWrapper[bytes]", output)
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 4096))
    lines = file.read().decode("utf-8", "replace").split("\n")
    last = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
    last = redact_text(last)
    return f": {last if len(last) <= 200 else last[:199] + '…'}" if last else ""


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _start_vllm() -> str:
    return (
        f"start vLLM with {VARIABLE}=True, --enable-lora and a --max-lora-rank that is at least lora.r, and let it "
        "read the adapter's folder at the same path"
    )
