"""The program with a writer that stops in the middle: half a file is on the disk, and the process waits to be killed.

Words: `checkpoint` or `export`, the file that says it is time, then the program's own words.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kd_lightning.cli.program import main


def wait(sign: Path) -> None:
    sign.touch()
    time.sleep(600)


def half_checkpoint(sign: Path) -> None:
    whole, calls = torch.save, [0]

    def save(checkpoint: Any, path: Path) -> None:
        calls[0] += 1
        if calls[0] <= 2:
            return whole(checkpoint, path)
        memory = io.BytesIO()
        whole(checkpoint, memory)
        Path(path).write_bytes(memory.getvalue()[: memory.tell() // 2])
        return wait(sign)

    torch.save = save


def half_export(sign: Path) -> None:
    def save(*args: Any, **kwargs: Any) -> None:
        wait(sign)

    PreTrainedTokenizerBase.save_pretrained = save  # the weights are written, the tokenizer is not


if __name__ == "__main__":
    what, sign, *words = sys.argv[1:]
    {"checkpoint": half_checkpoint, "export": half_export}[what](Path(sign))
    sys.exit(main(words))
