"""The data module for prompts: a model responds to them before the first step, and its words are learned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.data.batch import SIDES
from kd_lightning.data.instruction import NOTES, InstructionDataModule
from kd_lightning.data.pairs import with_answer
from kd_lightning.data.prompts import read_prompts
from kd_lightning.data.rows import Conversation
from kd_lightning.data.tokenizing import gather, tokenised


class PromptDataModule(InstructionDataModule):
    """Instruction tuning on the words of a model: SeqKD where it is the teacher.

    Of the training rows the prompt alone is taken; the responses come through `replace_responses`, which a
    `Regeneration` among the trainer's callbacks calls before the first step. `val` and `test` keep their answers.

    Args:
        args: as for `InstructionDataModule`, in its order.
        kwargs: as there.

    Attributes:
        report: as there; of `train`, of the responses.
        before_pass: None, or what to call with 0 before the training rows are first read: it must bring the responses.

    Raises:
        ValueError: as there; and where the training rows are asked for and there is no response.

    Reference: Kim and Rush, arXiv 1606.07947.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before_pass: Callable[[int], None] | None = None
        self._answered = False

    def _load(self, split: str) -> Any:
        if split != "train":
            return super()._load(split)
        rows = gather(read_prompts, split, {"sources": self.sources[split]})
        self.report[split] = {"rows": len(rows), "kept": len(rows), **dict.fromkeys(NOTES, 0)}
        rank_zero_info(f"train: {len(rows)} prompts")
        return rows

    def train_dataloader(self) -> Any:
        """Batches of this rank; the responses come first.

        Raises:
            ValueError: they do not.
        """
        if not self._answered and self.before_pass is not None:
            self.before_pass(0)
        if not self._answered:
            raise ValueError("nobody responds to the training prompts: give a Regeneration among trainer.callbacks")
        return super().train_dataloader()

    def missing_responses(self, side: str = "teacher") -> list[int]:
        """The `row_ids` of the training rows that have no response yet: all, or none."""
        return [] if self._answered else self._rows["train"]["row_id"][:]

    def replace_responses(self, responses: Mapping[int, str], side: str = "teacher") -> None:
        """Take the responses that are learned. On every rank, in `before_pass`.

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
        self._rows["train"] = self._kept("train", tokenised(told, "train", self.text_tokenizer))
        self._answered = True


@dataclasses.dataclass(frozen=True)
class _Answer:
    responses: dict[int, str]
    source: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        conversation = with_answer(Conversation.load(row["conversation"]), self.responses.get(row["row_id"]))
        return {"conversation": conversation.dump(), "source": self.source}
