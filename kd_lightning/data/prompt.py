"""Prompts without responses: reading them, and the data module whose responses are generated during the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.data.collate import SIDES
from kd_lightning.data.conversation import TURNS, Conversation
from kd_lightning.data.instruction import InstructionDataModule
from kd_lightning.data.pairs import parse_prompt, with_answer
from kd_lightning.data.row_report import NOTES
from kd_lightning.data.sampler import ResumableLoader
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import gather, json_digest

FORMS = "'instruction' (with an optional 'input'), 'prompt' or 'messages'"


def parse_question(row: Mapping[str, Any], location: str) -> Conversation:
    """A row's prompt; of `messages`, all turns except the last answer.

    Raises:
        ValueError: there is none, or a field is of a wrong type.
    """
    if all(row.get(name) is None for name in ("instruction", "prompt", "messages", *TURNS)):
        names = ", ".join(repr(name) for name in row) or "no fields"
        hint = " (a document has no prompt to answer)" if "text" in row else ""
        raise ValueError(f"{location}: a row needs {FORMS}; this one has {names}{hint}")
    return parse_prompt(row, location)


def read_prompts(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Columns of each row: `row` (the fields, as JSON), `conversation` (the prompt, as JSON), `location`, `row_id`."""
    rows = (pair for source in sources for pair in read_rows(source, split))
    for number, (location, row) in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield {
            "row": text,
            "conversation": parse_question(row, location).dump(),
            "location": location,
            "row_id": number,
        }


class PromptDataModule(InstructionDataModule):
    """Instruction tuning on responses of a model: SeqKD if it is the teacher.

    Only the prompts of the training rows are used; a `Regeneration` callback passes the responses to
    `replace_responses` before the first step. `val` and `test` keep their answers.

    Args:
        args: as for `InstructionDataModule`, in its order.
        kwargs: as for `InstructionDataModule`.

    Attributes:
        report: as for `InstructionDataModule`; for `train`, of the generated responses.

    Raises:
        ValueError: as for `InstructionDataModule`; in `train_dataloader`: there are no responses.

    Reference: Kim and Rush, arXiv 1606.07947.

    Examples:
        >>> from pathlib import Path
        >>> from kd_lightning import PromptDataModule
        >>> _ = Path("prompts.jsonl").write_text('{"prompt": "Greet me."}', encoding="utf-8")
        >>> data = PromptDataModule(train="prompts.jsonl", tokenizer="asset:student")
        >>> data.setup("fit")
        >>> data.replace_responses({0: "Good day!"}, side="teacher")  # as `Regeneration` does
        >>> next(iter(data.train_dataloader()))["source"]  # 1: the teacher
        tensor([1])
    """

    accepts_responses = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._responses: tuple[dict[int, str], str] | None = None  # and the side that generated them

    def load_split(self, split: str) -> Any:
        """Read a split; of `train`, the prompts with their responses if there are any."""
        if split != "train":
            return super().load_split(split)
        rows = gather(read_prompts, split, {"sources": self.sources[split]}, roles=self.text_tokenizer.own_roles)
        if self._responses is not None:  # read again, with another tokenizer or date
            return self._with_responses(rows, *self._responses)
        self.report[split] = {"rows": len(rows), "kept": len(rows), **dict.fromkeys(NOTES, 0)}
        rank_zero_info(f"train: {len(rows)} prompts")
        return rows

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank; the callbacks of `add_before_pass` bring the responses first.

        Raises:
            ValueError: there are no responses.
        """
        if self._responses is None:
            self.run_before_pass(0)
        if self._responses is None:
            raise ValueError(
                "the training data has prompts without responses: add a Regeneration callback to trainer.callbacks"
            )
        return super().train_dataloader()

    def missing_responses(self, side: str = "teacher") -> list[int]:
        """The `row_ids` of the training rows that have no response yet: all of them, or none."""
        return self._rows["train"]["row_id"][:] if self._responses is None else []

    def replace_responses(self, responses: Mapping[int, str], side: str = "teacher") -> None:
        """Train on these responses; on every rank, in a callback of `add_before_pass`.

        Rows without a response, or with one that is empty or begins after `max_length`, are dropped and reported. The
        responses stay if the data module is used again with another tokenizer.

        Args:
            responses: texts by the number of the row (`row_ids` of a batch, `index` of `generation_rows`).
            side: which model generated them, "teacher" or "student".

        Raises:
            ValueError: there are responses already, or no usable row is left.
        """
        if self._responses is not None:
            raise ValueError(
                "the training prompts already have responses: PromptDataModule takes them once, before the first step"
            )
        given = dict(responses)
        self._rows["train"] = self._with_responses(self._rows["train"], given, side)
        self._responses = given, side

    def _with_responses(self, rows: Any, responses: dict[int, str], side: str) -> Any:
        """The prompts with their responses, tokenized; rows without a usable one are dropped."""
        answered = rows.map(
            _Answer(responses, SIDES[side]),
            keep_in_memory=True,
            new_fingerprint=json_digest([rows._fingerprint, side, sorted(responses.items())]),
            desc="Responses",
        )
        return self.keep_usable("train", self.tokenized(answered, "train"))


@dataclasses.dataclass(frozen=True)
class _Answer:
    responses: dict[int, str]
    source: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        conversation = with_answer(Conversation.load(row["conversation"]), self.responses.get(row["row_id"]))
        return {"conversation": conversation.dump(), "source": self.source}
