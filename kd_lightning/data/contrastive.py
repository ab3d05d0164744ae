"""The data module for pairs: the teacher's and the student's response to one prompt in one batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.data.collate import SIDES, PairRows
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.instruction import InstructionDataModule
from kd_lightning.data.pairs import read_pairs, read_teacher_answers, with_answer
from kd_lightning.data.row_report import differences_of, extra_counts, extra_notes
from kd_lightning.data.rows.teacher_input import RowColumns
from kd_lightning.data.sampler import BatchOrder, ResumableLoader
from kd_lightning.data.saved_responses import SavedResponses
from kd_lightning.data.sources import as_list
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import gather, json_digest

REASONS = {
    "side_missing": "dropped with one response missing",
    "prompt_differs": "dropped with two different prompts",
    "no_partner": "dropped without a partner in the other file",
    "empty": "dropped with an empty response",
    "cut_away": "dropped with a response that does not begin within max_length={max_length}",
    "unlocated": "dropped with a response not found in the rendered chat template",
    "differs": "dropped with a response that the teacher's chat template writes otherwise",
}
"""The message for each reason to drop a pair."""
LOCATIONS_SHOWN = 3  # dropped pairs of each kind whose file and line are printed


class ContrastiveDataModule(InstructionDataModule):
    """Pairs of the teacher's and the student's response to one prompt; both are in the same batch.

    A row holds a prompt (`prompt`, a text or a list of messages; `messages`, without its last answer; or `instruction`
    with an optional `input`) with `teacher_response` and `student_response`, or with `chosen` (the teacher's) and
    `rejected` (the student's). Alternatively, two files with one `response` per row, as `kd-lightning generate` writes
    them, are joined by prompt: `train` holds the teacher's, `student_responses` the student's; rows with the same
    prompt are joined in file order. Pairs that cannot be used are dropped and reported with file and line.

    A batch holds both halves of `batch_size` pairs one after the other, 2·batch_size rows, with the column `source`:
    1 for the teacher's response, 2 for the student's. `row_ids` number the pairs. `val` and `test` are ordinary
    instruction files (of a pair, the teacher's response is used).

    Args:
        args: as for `InstructionDataModule`, in its order; `batch_size` counts pairs.
        student_responses: files with the student's `response` to the prompts of `train`; None: `train` holds pairs.
        responses: "data", or "generate": a row may be a prompt alone, and the missing responses are passed to
            `replace_responses` before the first step.
        kwargs: as for `InstructionDataModule`.

    Attributes:
        report: as for `InstructionDataModule`; `train` in pairs, also `side_missing`, `prompt_differs`, `no_partner`.

    Raises:
        ValueError: an argument is out of its range; in `setup`: data that cannot be read, or no usable pair.

    Examples:
        >>> from pathlib import Path
        >>> from kd_lightning import ContrastiveDataModule
        >>> _ = Path("pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello!", "rejected": "Bye!"}', "utf-8")
        >>> data = ContrastiveDataModule(train="pairs.jsonl", tokenizer="asset:student")
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["source"]
        tensor([1, 2])
    """

    read = staticmethod(read_teacher_answers)
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
            raise ValueError(f"student_responses must be None with responses='generate', got {student_responses!r}")
        self.student_responses = student_responses
        self.responses = responses
        self._halves: dict[str, Any] = {}  # the two sides of the training pairs, row by row
        self._pairs: PairRows | None = None
        self._order: BatchOrder | None = None
        self._saved = SavedResponses()
        self._announced = -1  # the last pass before which the callbacks were called

    @property
    def rows_per_batch(self) -> int:
        """Sequences of `max_length` tokens in a batch on each rank: two for each pair."""
        return 2 * self.rows_within(self.token_limit("train"))

    def token_limit(self, split: str) -> int | None:
        """Tokens of a batch, at most; of pairs half as many, because a pair is counted as its longer half."""
        limit = super().token_limit(split)
        return limit and max(1, limit // 2) if split == "train" else limit

    # ---------------------------------------------------------------------------------------------------- preparation
    def load_split(self, split: str) -> Any:
        """Read and tokenize a split; of `train` both halves of the pairs. Fills `report[split]`."""
        if split != "train":
            return super().load_split(split)
        late = self.responses == "generate"
        files = {"sources": self.sources["train"], "student": as_list(self.student_responses)}
        texts = ("row", "conversation", "student", "location", "dropped")
        rows = gather(read_pairs, split, files, texts, self.text_tokenizer.own_roles, late=late)
        other = rows.select_columns(["row", "student", "location", "row_id"]).rename_column("student", "conversation")
        halves = {"teacher": rows.remove_columns("student"), "student": other}
        self._halves = {side: self.tokenized(half, split) for side, half in halves.items()}
        self._pairs = self._order = None
        self._drop_unusable(keep=("", "empty") if late else ("",))
        replaced = {side: dict(found) for side, found in self._saved.texts.items() if found}
        for side, found in replaced.items():  # read again, with another tokenizer or date
            self._replace(side, found)
        if not replaced:
            self._read_saved()
        return self._halves["teacher"]

    def _drop_unusable(self, keep: tuple[str, ...]) -> None:
        """Drop the pairs whose reason is not one of `keep`, and report."""
        reasons = self._reasons()
        kept = [n for n, reason in enumerate(reasons) if reason in keep]
        lengths = [self._halves[side]["full_length"][:] for side in SIDES]
        counts = {
            "rows": len(reasons),
            "kept": len(kept),
            **{reason: reasons.count(reason) for reason in REASONS if reason != "differs" or reason in reasons},
            "truncated": sum(max(lengths[0][n], lengths[1][n]) > self.max_length for n in kept),
            **sum((Counter(extra_counts(half)) for half in self._halves.values()), Counter()),
        }
        self.report["train"] = counts
        locations = self._halves["teacher"]["location"][:]
        notes = {
            name: self._note(name, [locations[n] for n, reason in enumerate(reasons) if reason == name])
            for name in REASONS
            if counts.get(name)
        }
        if not kept:
            raise ValueError(f"{', '.join(self.sources['train'])}: no pair can be used: {', '.join(notes.values())}")
        if "empty" in keep and counts["empty"]:
            notes["empty"] = f"{counts['empty']} of them without both responses yet"
        if counts["truncated"]:
            notes["truncated"] = f"{counts['truncated']} truncated to max_length={self.max_length}"
        rank_zero_info(
            ", ".join([f"train: {len(kept)} of {len(reasons)} pairs", *notes.values(), *extra_notes(counts)])
        )
        if len(kept) < len(reasons):
            self._halves = {side: half.select(kept) for side, half in self._halves.items()}

    def _reasons(self) -> list[str]:
        """Why each pair cannot be trained on; "" if it can."""
        dropped = self._halves["teacher"]["dropped"][:]
        late = self.responses == "generate"
        columns = [self._halves[side][name][:] for side in SIDES for name in ("empty", "first_label")]
        differences = zip(*(differences_of(self._halves[side]) for side in SIDES), strict=True)
        reasons = []
        for reason, differing, *halves in zip(dropped, differences, *columns, strict=True):
            first = (halves[1], halves[3])
            if reason and not (late and reason == "side_missing"):
                reasons.append(reason)
            elif halves[0] or halves[2]:
                reasons.append("empty")
            elif any(differing):
                reasons.append("differs")
            else:
                reasons.append("unlocated" if min(first) < 0 else "cut_away" if max(first) >= self.max_length else "")
        return reasons

    def _note(self, reason: str, locations: list[str]) -> str:
        hidden = len(locations) - LOCATIONS_SHOWN
        more = f" and {hidden} more" if hidden > 0 else ""
        text = REASONS[reason].format(max_length=self.max_length)
        return f"{len(locations)} {text} ({', '.join(locations[:LOCATIONS_SHOWN])}{more})"

    # -------------------------------------------------------------------------------------------------------- loaders
    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank's pairs, in the order of (seed, epoch), resumable; ValueError without a whole pair."""
        if self._pairs is None:
            if self.responses == "generate":
                self._announce(0)
                self._drop_unusable(keep=("",))
                self._rows["train"] = self._halves["teacher"]
            self._pairs = PairRows(self._halves)
        loader = super().train_dataloader()
        if isinstance(loader.sampler, BatchOrder):
            self._order = loader.sampler
            loader.call_before_pass(self._announce)
        return loader

    def remove_before_pass(self, callback: Callable[[int], None]) -> None:
        """Remove a callback; a later run calls its own from its first pass on."""
        super().remove_before_pass(callback)
        self._announced = -1

    def _announce(self, number: int) -> None:
        """Call the callbacks once before each pass."""
        if number > self._announced:
            self._announced = number
            self.run_before_pass(number)

    def token_rows(self, split: str) -> tuple[Any, list[int]]:
        """The data set that batches of a split are read from, and the number of tokens of each row (longer half)."""
        if split != "train" or self._pairs is None:
            return super().token_rows(split)
        return self._pairs, self.row_lengths(split)

    def row_lengths(self, split: str) -> list[int]:
        """The number of tokens of each row of a split, of a pair's longer half."""
        if split != "train":
            return super().row_lengths(split)
        return [max(pair) for pair in zip(*(self._halves[side]["length"][:] for side in SIDES), strict=True)]

    # ------------------------------------------------------------------------------------------------- new responses
    def missing_responses(self, side: str = "student") -> list[int]:
        """The `row_ids` of the training pairs that have no response of this side yet."""
        half = self._halves[_checked_side(side)]
        return [row_id for row_id, empty in zip(half["row_id"][:], half["empty"][:], strict=True) if empty]

    def replace_responses(self, responses: Mapping[int, str], side: str = "student") -> None:
        """Replace responses of one side, on every rank, in a callback of `add_before_pass`; the other side's are kept.

        An empty response, or one that does not begin within `max_length`, leaves the old one as it is. Replaced
        responses are saved in ROOT/responses, where a resumed run finds them.

        Args:
            responses: texts by the pair's number (`row_ids` of a batch, `index` of `generation_rows`), the same on
                every rank.
            side: "student" or "teacher".

        Raises:
            ValueError: there is no pair of that number, or a response is not a string.
        """
        known = set(self._halves[_checked_side(side)]["row_id"][:])
        for row_id, text in responses.items():
            if row_id not in known:
                raise ValueError(f"responses must have row_ids of training pairs as keys, got {row_id}")
            if not isinstance(text, str):
                raise ValueError(f"responses[{row_id}] must be a string, got {type(text).__name__}")
        taken = self._replace(side, responses)
        ignored = len(responses) - taken
        note = f", ignored {ignored} that are empty or begin after max_length={self.max_length}" if ignored else ""
        rank_zero_info(f"train: replaced {taken} of {len(known)} responses of the {side}{note}")
        self._saved.save(self._folder, side, write=self.trainer is None or self.trainer.is_global_zero)

    @property
    def _folder(self) -> Path:
        return Path.cwd() / "responses" if self.trainer is None else Path(self.trainer.default_root_dir) / "responses"

    def _replace(self, side: str, responses: Mapping[int, str]) -> int:
        """Tokenize the new responses and hand them to existing loaders; returns how many were usable."""
        old, new = self._halves[side], _Replace(self.text_tokenizer, dict(responses), self.add_teacher_input)
        stamp = json_digest([old._fingerprint, sorted(responses.items())])
        half = old.map(new, features=old.features, keep_in_memory=True, new_fingerprint=stamp, desc="Tokenizing")
        taken = 0
        for row_id, text, conversation in zip(
            half["row_id"][:], map(responses.get, half["row_id"][:]), half["conversation"][:], strict=True
        ):
            if text is not None and Conversation.load(conversation).answer == text and text.strip():
                self._saved.texts[side][row_id] = text
                taken += 1
        self._halves[side] = half
        if side == "teacher" and "train" in self._rows:
            self._rows["train"] = half
        if self._pairs is not None:
            self._pairs.replace(side, half)
        if self._order is not None:
            self._order.set_lengths(self.row_lengths("train"))
        return taken

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """The files that hold the replaced responses, and the last pass before which the callbacks were called."""
        return {**super().state_dict(), **self._saved.state_dict(), "announced": self._announced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the replaced responses; ValueError if a file in ROOT/responses is missing or has changed since."""
        self._saved.load_state_dict(state_dict)
        self._announced = state_dict["announced"]
        super().load_state_dict(state_dict)
        if "train" in self._rows:
            self._read_saved()

    def _read_saved(self) -> None:
        for side, texts in self._saved.read(self._folder):
            self._replace(side, texts)


@dataclasses.dataclass(frozen=True)
class _Replace:
    tokenizer: TextTokenizer
    responses: dict[int, str]
    add_teacher_input: RowColumns | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        text = self.responses.get(row["row_id"])
        if text is None:
            return {}
        conversation = with_answer(Conversation.load(row["conversation"]), text)
        new = {**row, "conversation": conversation.dump(), **self.tokenizer.tokenize(conversation)}
        if self.add_teacher_input is not None:
            new |= self.add_teacher_input(new)
        differs = bool(new.get("teacher_difference"))
        usable = not new["empty"] and 0 <= new["first_label"] < self.tokenizer.max_length and not differs
        return new if usable else {}


def _checked_side(side: str) -> str:
    if side not in SIDES:
        raise ValueError(f"side must be 'teacher' or 'student', got {side!r}")
    return side
