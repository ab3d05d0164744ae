"""Prompts without responses: reading them, and the data module that waits for a model to respond."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.data.collate import SIDES
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.instruction import NOTES, InstructionDataModule
from kd_lightning.data.pairs import parse_prompt, with_answer
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import gather, tokenize_rows

FORMS = "'instruction' (with an optional 'input'), 'prompt' or 'messages'"


def parse_question(row: Mapping[str, Any], place: str) -> Conversation:
    """A row's prompt; of `messages` all turns but the last answer.

    Raises:
        ValueError: there is none, or a field is of a wrong type.
    """
    if all(row.get(name) is None for name in ("instruction", "prompt", "messages")):
        names = ", ".join(repr(name) for name in row) or "no field at all"
        raise ValueError(f"{place}: a row needs {FORMS}; this one has {names}")
    return parse_prompt(row, place)


def read_prompts(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Columns of each row: `row` (the fields, as JSON), `conversation` (the prompt, as JSON), `place`, `row_id`."""
    found = (pair for source in sources for pair in read_rows(source, split))
    for number, (place, row) in enumerate(found):
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield {"row": text, "conversation": parse_question(row, place).dump(), "place": place, "row_id": number}


class PromptDataModule(InstructionDataModule):
    """Instruction tuning on the words of a model: SeqKD where it is the teacher.

    Of the training rows the prompt alone is taken; the responses come through `replace_responses`, which a
    `Regeneration` among the trainer's callbacks calls before the first step. `val` and `test` keep their answers.

    Args:
        args: as for `InstructionDataModule`, in its order.
        kwargs: as there.

    Attributes:
        report: as there; of `train`, of the responses.

    Raises:
        ValueError: as there; and where the training rows are asked for and there is no response.

    Reference: Kim and Rush, arXiv 1606.07947.
    """

    accepts_responses = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answered = False

    def _load_split(self, split: str) -> Any:
        if split != "train":
            return super()._load_split(split)
        rows = gather(read_prompts, split, {"sources": self.sources[split]})
        self.report[split] = {"rows": len(rows), "kept": len(rows), **dict.fromkeys(NOTES, 0)}
        rank_zero_info(f"train: {len(rows)} prompts")
        return rows

    def train_dataloader(self) -> Any:
        """Batches of this rank; the responses come first.

        Raises:
            ValueError: they do not.
        """
        if not self._answered:
            self._call_before_pass(0)
        if not self._answered:
            raise ValueError("nobody responds to the training prompts: give a Regeneration among trainer.callbacks")
        return super().train_dataloader()

    def missing_responses(self, side: str = "teacher") -> list[int]:
        """The `row_ids` of the training rows that have no response yet: all, or none."""
        return [] if self._answered else self._rows["train"]["row_id"][:]

    def replace_responses(self, responses: Mapping[int, str], side: str = "teacher") -> None:
        """Take the responses that are learned. On every rank, in a callback of `add_before_pass`.

        Rows without a response, or with one that is empty or begins after `max_length`, are dropped and reported.

        Args:
            responses: texts by the number of the row (`row_ids` of a batch, `index` of `generation_rows`).
            side: who wrote them, "teacher" or "student".

        Raises:
            ValueError: there are responses already, or no row is left.
        """
        if self._answered:
            raise ValueError("the training prompts have their responses: they come once, before the first step")
        rows = self._rows["train"]
        stamp = json.dumps([rows._fingerprint, side, sorted(responses.items())])
        told = rows.map(
            _Answer(dict(responses), SIDES[side]),
            keep_in_memory=True,
            new_fingerprint=hashlib.sha256(stamp.encode()).hexdigest()[:32],
            desc="Responses",
        )
        self._rows["train"] = self._kept("train", tokenize_rows(told, "train", self.text_tokenizer))
        self._answered = True


@dataclasses.dataclass(frozen=True)
class _Answer:
    responses: dict[int, str]
    source: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        conversation = with_answer(Conversation.load(row["conversation"]), self.responses.get(row["row_id"]))
        return {"conversation": conversation.dump(), "source": self.source}
