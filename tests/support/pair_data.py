"""Files of pairs and data modules that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chat_templates import FAMILIES
from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule
from tiny_tokenizers import tiny

CHATML = FAMILIES["chatml"]


def tokenizer() -> Any:
    return tiny(CHATML.specials, None, "<|im_end|>", template=CHATML.template)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"say {n} " * (n % 5 + 1),
            "teacher_response": f"the answer {n}",
            "student_response": f"what {n} " * (n % 3 + 1) + "?",
        }
        for n in range(count)
    ]


def module(train: str, **kwargs: Any) -> ContrastiveDataModule:
    data = ContrastiveDataModule(train, **{"tokenizer": tokenizer(), "batch_size": 3, "shuffle": False, **kwargs})
    data.setup("fit")
    return data


def halves(data: ContrastiveDataModule) -> list[tuple[int, int, str, str]]:
    """Every row of a pass: number of the pair, source, prompt, counted words."""
    found = []
    for batch in data.train_dataloader():
        for number, source, ids, labels in zip(
            *(batch[name] for name in ("row_ids", "source", "input_ids", "labels")), strict=True
        ):
            first = int((labels != IGNORE_INDEX).nonzero()[0])
            texts = data.tokenizer.decode(ids[:first]), data.tokenizer.decode(labels[labels != IGNORE_INDEX])
            found.append((int(number), int(source), *texts))
    return found
