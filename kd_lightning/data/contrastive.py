"""The data module for pairs: the teacher's and the student's response to one prompt, side by side in a batch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.atomic_io import atomic_file
from kd_lightning.data.collate import SIDES, PairRows
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.instruction import InstructionDataModule, listed
from kd_lightning.data.pairs import read_answers, read_pairs, with_answer
from kd_lightning.data.sampler import BatchOrder
from kd_lightning.data.tokenization import TextTokenizer, gather, tokenize_rows

REASONS = {
    "side_missing": "dropped with a side missing",
    "prompt_differs": "dropped with prompts that differ",
    "no_partner": "dropped without a partner in the other file",
    "empty": "dropped with an empty response",
    "cut_away": "dropped with a response that does not begin within max_length={max_length}",
    "unlocated": "dropped with a response not located in the chat template's text",
}
NAMED = 3
"""So many dropped pairs of a kind are named by file and line."""


class ContrastiveDataModule(InstructionDataModule):
    """Pairs of the teacher's and the student's response to one prompt; both stand in one batch.

    A row holds a prompt (`prompt`, a text or a list of messages; `messages`, of which the last answer is left out; or
    `instruction` with an optional `input`) with `teacher_response` and `student_response`, or with `chosen` (the
    teacher's) and `rejected` (the student's). Or two files with one `response` a row, as `kd-lightning generate` writes
    them, are joined by prompt: `train` the teacher's, `student_responses` the student's; rows of the same prompt are
    joined in their order. Pairs that cannot be used are dropped, counted and named.

    A batch holds the two halves of `batch_size` pairs one after the other, 2·batch_size rows, with the column `source`:
    1 for the teacher's response, 2 for the student's. `row_ids` number the pairs. `val` and `test` are ordinary
    instruction files (of a pair the teacher's response is taken).

    Args:
        args: as for `InstructionDataModule`, in its order; `batch_size` counts pairs.
        student_responses: files with the student's `response` to the prompts of `train`; None: `train` holds pairs.
        responses: "data", or "generate": a row may be a prompt alone, and what is missing comes before the first step
            through `replace_responses`.
        kwargs: as for `InstructionDataModule`.

    Attributes:
        report: as there; for `train` in pairs, and with `side_missing`, `prompt_differs`, `no_partner`.

    Raises:
        ValueError: an argument is out of its range; in `setup`: data that cannot be read, or no pair that can be used.
    """

    read = staticmethod(read_answers)
    accepts_responses = True
    responses_can_change = True

    def __init__(
        self,
        *args: Any,
        student_responses: str | list[str] | None = None,
        responses: str = "data",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if responses not in ("data", "generate"):
            raise ValueError(f"responses must be 'data' or 'generate', got {responses!r}")
        if responses == "generate" and student_responses:
            raise ValueError(
                f"student_responses must be left out where responses is 'generate', got {student_responses!r}"
            )
        self.student_responses = student_responses
        self.responses = responses
        self._halves: dict[str, Any] = {}  # the two sides of the training pairs, row by row
        self._loaded: PairRows | None = None
        self._order: BatchOrder | None = None
        self._texts: dict[str, dict[int, str]] = {side: {} for side in SIDES}  # what was replaced
        self._files: dict[str, dict[str, str]] = {}  # where it was written
        self._replacements = 0
        self._announced = -1  # the last pass before which the callbacks were called

    @property
    def rows_per_batch(self) -> int:
        """Sequences per batch on each rank: two for each pair."""
        return 2 * self.batch_size

    # ---------------------------------------------------------------------------------------------------- preparation
    def _load_split(self, split: str) -> Any:
        if split != "train":
            return super()._load_split(split)
        late = self.responses == "generate"
        files = {"sources": self.sources["train"], "student": listed(self.student_responses)}
        rows = gather(read_pairs, split, files, ("row", "conversation", "student", "place", "dropped"), late=late)
        other = rows.select_columns(["student", "place", "row_id"]).rename_column("student", "conversation")
        self._halves = {
            "teacher": tokenize_rows(rows.remove_columns("student"), split, self.text_tokenizer),
            "student": tokenize_rows(other, split, self.text_tokenizer),
        }
        self._keep(("", "empty") if late else ("",))
        if self._files:
            self._read_replaced()
        return self._halves["teacher"]

    def _keep(self, reasons: tuple[str, ...]) -> None:
        """Drop the pairs with any other reason against them, and report."""
        found = self._reasons()
        chosen = [n for n, reason in enumerate(found) if reason in reasons]
        lengths = [self._halves[side]["full_length"][:] for side in SIDES]
        self.report["train"] = {
            "rows": len(found),
            "kept": len(chosen),
            **{reason: found.count(reason) for reason in REASONS},
            "truncated": sum(max(lengths[0][n], lengths[1][n]) > self.max_length for n in chosen),
        }
        places = self._halves["teacher"]["place"][:]
        notes = [self._note(name, [places[n] for n, r in enumerate(found) if r == name]) for name in REASONS]
        if not chosen:
            said = ", ".join(filter(None, notes))
            raise ValueError(f"{', '.join(self.sources['train'])}: no pair can be used: {said}")
        if "empty" in reasons and (waiting := found.count("empty")):
            notes[list(REASONS).index("empty")] = f"{waiting} of them wait for a response"
        if self.report["train"]["truncated"]:
            notes.append(f"{self.report['train']['truncated']} cut to max_length={self.max_length}")
        rank_zero_info(f"train: {len(chosen)} of {len(found)} pairs" + "".join(f", {note}" for note in notes if note))
        if len(chosen) < len(found):
            self._halves = {side: half.select(chosen) for side, half in self._halves.items()}

    def _reasons(self) -> list[str]:
        """Why each pair cannot be learned from; "" where it can."""
        dropped = self._halves["teacher"]["dropped"][:]
        late = self.responses == "generate"
        columns = [self._halves[side][name][:] for side in SIDES for name in ("empty", "first_counted")]
        found = []
        for reason, *halves in zip(dropped, *columns, strict=True):
            first = (halves[1], halves[3])
            if reason and not (late and reason == "side_missing"):
                found.append(reason)
            elif halves[0] or halves[2]:
                found.append("empty")
            else:
                found.append("unlocated" if min(first) < 0 else "cut_away" if max(first) >= self.max_length else "")
        return found

    def _note(self, reason: str, places: list[str]) -> str:
        if not places:
            return ""
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        text = REASONS[reason].format(max_length=self.max_length)
        return f"{len(places)} {text} ({', '.join(places[:NAMED])}{more})"

    # -------------------------------------------------------------------------------------------------------- loaders
    def train_dataloader(self) -> Any:
        """Batches of pairs of this rank, in an order that (seed, epoch) decides and a checkpoint can go on with.

        Raises:
            ValueError: no pair has both responses.
        """
        if self._loaded is None:
            if self.responses == "generate":
                self._announce(0)
                self._keep(("",))
                self._rows["train"] = self._halves["teacher"]
            self._loaded = PairRows(self._halves)
        loader = super().train_dataloader()
        if isinstance(loader.sampler, BatchOrder):
            self._order = loader.sampler
            loader.before_pass = self._announce
        return loader

    def _announce(self, number: int) -> None:
        if number > self._announced:
            self._announced = number
            self._call_before_pass(number)

    def _token_rows(self, split: str) -> tuple[Any, list[int]]:
        if split != "train" or self._loaded is None:
            return super()._token_rows(split)
        return self._loaded, self._lengths()

    def _lengths(self) -> list[int]:
        return [max(pair) for pair in zip(*(self._halves[side]["length"][:] for side in SIDES), strict=True)]

    # ------------------------------------------------------------------------------------------------- new responses
    def missing_responses(self, side: str = "student") -> list[int]:
        """The `row_ids` of the training pairs that have no response of a side yet."""
        half = self._halves[_checked(side)]
        return [row_id for row_id, empty in zip(half["row_id"][:], half["empty"][:], strict=True) if empty]

    def replace_responses(self, responses: Mapping[int, str], side: str = "student") -> None:
        """Replace responses of one side, on every rank, in a callback of `add_before_pass`; the other side's are kept.

        An empty response, or one that does not begin within `max_length`, leaves the old one where it is. What was
        replaced is written to ROOT/responses; a run resumed from a checkpoint finds it there.

        Args:
            responses: texts by the pair's number (`row_ids` of a batch, `index` of `generation_rows`), the same on
                every rank.
            side: "student" or "teacher".

        Raises:
            ValueError: a pair of that number is not there, or a response is no text.
        """
        known = set(self._halves[_checked(side)]["row_id"][:])
        for row_id, text in responses.items():
            if row_id not in known:
                raise ValueError(f"responses must be of the training pairs, and there is none with row_id {row_id}")
            if not isinstance(text, str):
                raise ValueError(f"responses[{row_id}] must be a text, got {type(text).__name__}")
        taken = self._put(side, responses)
        note = f", {len(responses) - taken} empty or too late for max_length" if taken < len(responses) else ""
        rank_zero_info(f"train: {taken} of {len(known)} responses of the {side} replaced{note}")
        self._replacements += 1
        name, content = f"{side}-{self._replacements:04d}.jsonl", self._content(side)
        self._files[side] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
        if getattr(self.trainer, "is_global_zero", True):
            with atomic_file(self._folder / name) as part:
                part.write_bytes(content)

    @property
    def _folder(self) -> Path:
        return Path(getattr(self.trainer, "default_root_dir", None) or os.getcwd()) / "responses"

    def _content(self, side: str) -> bytes:
        rows = ({"row_id": row_id, "response": text} for row_id, text in sorted(self._texts[side].items()))
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    def _put(self, side: str, responses: Mapping[int, str]) -> int:
        """Tokenise the new responses and let loaders that are there already read them; how many were taken."""
        old, new = self._halves[side], _Replace(self.text_tokenizer, dict(responses))
        stamp = hashlib.sha256(json.dumps([old._fingerprint, sorted(responses.items())]).encode()).hexdigest()[:32]
        half = old.map(new, features=old.features, keep_in_memory=True, new_fingerprint=stamp, desc="Tokenising")
        taken = 0
        for row_id, text, conversation in zip(
            half["row_id"][:], map(responses.get, half["row_id"][:]), half["conversation"][:], strict=True
        ):
            if text is not None and Conversation.load(conversation).answer == text and text.strip():
                self._texts[side][row_id] = text
                taken += 1
        self._halves[side] = half
        if side == "teacher" and "train" in self._rows:
            self._rows["train"] = half
        if self._loaded is not None:
            self._loaded.put(side, half)
        if self._order is not None:
            self._order.lengths = torch.as_tensor(self._lengths())
        return taken

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Which files hold what was replaced, and the last pass before which the callbacks were called."""
        return {"files": dict(self._files), "replacements": self._replacements, "announced": self._announced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what was replaced.

        Raises:
            ValueError: a file is missing under ROOT/responses, or another than the checkpoint saw.
        """
        self._files, self._replacements = dict(state_dict["files"]), state_dict["replacements"]
        self._announced = state_dict["announced"]
        if "train" in self._rows:
            self._read_replaced()

    def _read_replaced(self) -> None:
        for side, file in self._files.items():
            path = self._folder / file["name"]
            if not path.is_file():
                raise ValueError(f"{path}: the checkpoint was written while these responses were read; they are gone")
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise ValueError(f"{path}: other responses than those the checkpoint was written with")
            rows = [json.loads(line) for line in content.split(b"\n") if line]
            self._put(side, {row["row_id"]: row["response"] for row in rows})


@dataclasses.dataclass(frozen=True)
class _Replace:
    tokenizer: TextTokenizer
    responses: dict[int, str]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        text = self.responses.get(row["row_id"])
        if text is None:
            return {}
        conversation = with_answer(Conversation.load(row["conversation"]), text)
        tokens = self.tokenizer.tokenize(conversation)
        usable = not tokens["empty"] and 0 <= tokens["first_counted"] < self.tokenizer.max_length
        return {"conversation": conversation.dump(), **tokens} if usable else {}


def _checked(side: str) -> str:
    if side not in SIDES:
        raise ValueError(f"side must be 'teacher' or 'student', got {side!r}")
    return side
