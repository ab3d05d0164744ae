"""The data module for instructions and conversations: files in, batches of tokens out."""

from __future__ import annotations

import json
import os
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from kd_lightning.data.base import DistillationDataModule, GenerationRow, NamesTokenizer, describe_rows
from kd_lightning.data.collate import Collator, PromptCollator, TokenRows
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.sampler import BatchOrder, ResumableLoader
from kd_lightning.data.tokenization import Reader, TextTokenizer, load_tokenizer, prepare, with_template
from kd_lightning.seeding import run_seed

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
SHORTEST = 8
NOTES = {
    "empty": "dropped without an answer",
    "cut_away": "dropped with no answer within max_length={max_length}",
    "truncated": "cut to max_length={max_length}",
    "unlocated": "answers not located in the chat template's text and not counted",
}
"""What is said of each number of the report."""


class InstructionDataModule(DistillationDataModule):
    """Instructions and conversations, as batches on which only the assistant's words count.

    A row is `instruction`, optional `input` and `output` (one user turn: instruction, newline, input); or `prompt` and
    `completion` (plain texts, or lists of messages); or `messages` with several turns, of which every assistant turn
    counts. The columns `tools` and `chat_template_kwargs` reach the chat template. What the user, the system or a tool
    says never counts; the end of an answer does. Rows without an answer are dropped, longer ones cut on the right;
    both are reported.

    Args:
        train: a `.jsonl`, `.json` or `.parquet` file, a folder written by `datasets.save_to_disk`, a `datasets` name
            (`NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`), an `asset:` name, or several of these.
        val: the same, for validation.
        test: the same, for test and predict.
        tokenizer: folder, hub name or `asset:` name; in Python also a loaded tokenizer; None: the student's own. The
            attribute of this name holds the loaded tokenizer, from `setup` on.
        batch_size: rows per batch on each rank, at least 1.
        max_length: longest sequence in tokens, at least 8.
        shuffle: a new order of the training rows every epoch; False: file order, rank r of N takes rows r, r + N, ….
        num_workers: processes that read ahead, at least 0.
        group_by_length: rows of similar length share a batch, in shuffled windows; does nothing without `shuffle`.
        chat_template: a Jinja template, or a file that holds one, in place of the tokenizer's own.
        chat_template_kwargs: variables for the chat template.
        seed: of the shuffling; None: the run's own (`seed_everything`), or 0 where none is set.
        pin_memory: let batches lie in page-locked memory, for a GPU.

    Attributes:
        report: per split, numbers of `rows`, `kept`, `empty` (no answer), `truncated` (cut, but kept), `cut_away` (no
            counted token left in `max_length`), and of `unlocated` answers (turns the template hides, not counted).

    Raises:
        ValueError: an argument is out of its range; in `setup`: data that cannot be read, or leaves nothing to count.
    """

    read: Reader | None = None  # what turns files into rows; None: instructions and conversations

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        tokenizer: str | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        shuffle: bool = True,
        num_workers: int = 0,
        group_by_length: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, SHORTEST)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        self.train, self.val, self.test = train, val, test
        self.sources = {"train": listed(train), "val": listed(val), "test": listed(test)}
        if not self.sources["train"]:
            raise ValueError(f"train must name at least one file, folder or data set, got {train!r}")
        self.tokenizer_source: str | PreTrainedTokenizerBase | None = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.batch_size = batch_size
        self.max_length = max_length
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.group_by_length = group_by_length
        self.chat_template = _read_template(chat_template)
        self.chat_template_kwargs = chat_template_kwargs
        self.seed = seed
        self.pin_memory = pin_memory
        self._rows: dict[str, Any] = {}

    # ---------------------------------------------------------------------------------------------------- preparation
    def prepare_data(self) -> None:
        """Tokenise once per machine; the other ranks then find the result in the cache of `datasets`."""
        state = getattr(self.trainer, "state", None)
        self.setup(getattr(getattr(state, "fn", None), "value", "fit"))

    def setup(self, stage: str) -> None:
        """Load tokenizer and rows of the splits that `stage` needs."""
        # forked workers must not inherit the tokenizer's threads
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self._tokenizer is None:
            if self.trainer is not None and isinstance(module := self.trainer.lightning_module, NamesTokenizer):
                self.use_tokenizer_of(module.tokenizer_name)
            if self.tokenizer_source is None:
                raise ValueError("tokenizer must be given where the student has no folder or name of its own, got None")
            self._tokenizer = load_tokenizer(self.tokenizer_source)
            with_template(self._tokenizer, self.chat_template, rank_zero_info)
        for split in SPLITS.get(stage, ("train", "val", "test")):
            if self.sources[split] and split not in self._rows:
                self._rows[split] = self._load_split(split)

    def use_tokenizer_of(self, model: str | None) -> None:
        """Load the tokenizer of this model in `setup`, unless the data module was given a tokenizer.

        Args:
            model: folder, hub name or `asset:` name; None changes nothing.
        """
        if self.tokenizer_source is None:
            self.tokenizer_source = model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer; available from `setup` on.

        Raises:
            ValueError: `setup` has not been called.
        """
        if self._tokenizer is None:
            raise ValueError(f"the tokenizer is not loaded yet: call {type(self).__name__}.setup('fit') first")
        return self._tokenizer

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """How rows become token ids: tokenizer, template and length together."""
        return TextTokenizer(self.tokenizer, self.chat_template, self.chat_template_kwargs, self.max_length)

    def _load_split(self, split: str) -> Any:
        """Protected: the rows of a split as a `datasets.Dataset`; fills `report[split]`."""
        return self._kept(split, prepare(self.sources[split], split, self.text_tokenizer, self.read))

    def _kept(self, split: str, rows: Any) -> Any:
        """The rows that can be learned from; what became of the others is reported."""
        columns = {name: rows[name][:] for name in ("empty", "first_counted", "full_length", "unlocated")}
        first, empty = columns["first_counted"], columns["empty"]
        kept = [n for n in range(len(rows)) if not empty[n] and 0 <= first[n] < self.max_length]
        self.report[split] = {
            "rows": len(rows),
            "kept": len(kept),
            "empty": sum(empty),
            "truncated": sum(columns["full_length"][n] > self.max_length for n in kept),
            "cut_away": sum(not e and f >= self.max_length for e, f in zip(empty, first, strict=True)),
            "unlocated": sum(columns["unlocated"]),
        }
        self._tell(split)
        if not kept:
            needed = min((f + 1 for e, f in zip(empty, first, strict=True) if not e and f >= 0), default=0)
            raise ValueError(_nothing_left(", ".join(self.sources[split]), self.max_length, needed, all(empty)))
        return rows.select(kept)

    def _tell(self, split: str) -> None:
        counts = self.report[split]
        texts = {name: text.format(max_length=self.max_length) for name, text in NOTES.items()}
        notes = [f"{counts[name]} {text}" for name, text in texts.items() if counts[name]]
        rank_zero_info(f"{split}: {counts['kept']} of {counts['rows']} rows" + "".join(f", {note}" for note in notes))

    # -------------------------------------------------------------------------------------------------------- loaders
    def train_dataloader(self) -> Any:
        """Batches of this rank, in an order that (seed, epoch) decides and that a checkpoint can go on with."""
        if getattr(self.trainer, "overfit_batches", 0):  # Lightning wants a plain loader in file order then
            return self._plain_loader("train")
        loader = self._loader("train", shuffle=self.shuffle, grouped=self.group_by_length and self.shuffle, fill=False)
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        loader.sampler.start_at(self._passes(), 0)  # loaders may be built anew in every epoch
        loader.sampler.pass_length = int(limit * len(loader)) if isinstance(limit, float) else min(limit, len(loader))
        return loader

    def _passes(self) -> int:
        """How many passes are done; `current_epoch` of a checkpoint at the end of one does not count that one yet."""
        loop = getattr(self.trainer, "fit_loop", None)
        return 0 if loop is None else int(loop.epoch_progress.current.processed)

    def val_dataloader(self) -> Any:
        """Every row once over all ranks, in file order; longest first where all are read and `group_by_length`."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> Any:
        """Every row once over all ranks, in file order; longest first where all are read and `group_by_length`."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Any:
        """Prompts of the test rows in file order, padded on the left; `row_ids` number the rows of the file."""
        prompts = self.generation_rows("test")
        rank, world_size = self._ranks()
        lengths = [len(row["prompt_ids"]) for row in prompts]
        order = BatchOrder(lengths, self.batch_size, fill=True, rank=rank, world_size=world_size)
        return ResumableLoader(
            _Prompts(prompts), batch_size=None, sampler=order, collate_fn=PromptCollator(self.pad_id)
        )

    def description(self) -> dict[str, str]:
        """Every loaded split in a line that changes with its rows."""
        return {f"{split} rows": describe_rows(rows) for split, rows in self._rows.items()}

    def longest(self) -> int:
        """Tokens of the longest row that is loaded; of prompts, which a run has yet to answer, nothing is known."""
        whole = [rows for rows in self._rows.values() if "length" in rows.column_names]
        return max((max(rows["length"][:], default=0) for rows in whole), default=0)

    def largest_id(self) -> int:
        """The largest token id of the rows that are loaded."""
        whole = [rows for rows in self._rows.values() if "input_ids" in rows.column_names]
        return max((max(ids, default=0) for rows in whole for ids in rows["input_ids"]), default=0)

    @property
    def splits(self) -> list[str]:
        """Splits that are loaded."""
        return list(self._rows)

    def every_row(self, split: str) -> Any:
        """Every row of a split once over all ranks, and equally many batches on each; longest first."""
        return self._loader(split, shuffle=False, grouped=True, fill=True)

    def _evaluation_loader(self, split: str) -> Any:
        if split not in self._rows:
            return []
        if getattr(self.trainer, "overfit_batches", 0):
            return self._plain_loader(split)
        whole = getattr(self.trainer, f"limit_{split}_batches", 1.0) == 1.0  # the first few are no sample of long rows
        grouped = self.group_by_length and self.shuffle and whole
        return self._loader(split, shuffle=False, grouped=grouped, fill=True)

    def _token_rows(self, split: str) -> tuple[Any, list[int]]:
        """Protected: what the batches of a split are read from, and the number of tokens of each of its rows."""
        rows = self._rows[split]
        return TokenRows(rows), rows["length"][:]

    def _loader(self, split: str, shuffle: bool, grouped: bool, fill: bool) -> Any:
        rows, lengths = self._token_rows(split)
        rank, world_size = self._ranks()
        order = BatchOrder(
            lengths,
            self.batch_size,
            shuffle=shuffle,
            group_by_length=grouped,
            fill=fill,
            seed=run_seed() if self.seed is None else self.seed,
            rank=rank,
            world_size=world_size,
        )
        return ResumableLoader(
            rows,
            batch_size=None,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=Collator(self.pad_id),
            pin_memory=self.pin_memory,
        )

    def _plain_loader(self, split: str) -> Any:
        rows, _ = self._token_rows(split)
        return ResumableLoader(rows, batch_size=self.batch_size, collate_fn=Collator(self.pad_id))

    def _ranks(self) -> tuple[int, int]:
        spread = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return spread["rank"], spread["num_replicas"]

    @property
    def pad_id(self) -> int:
        """The token id that fills padding; the attention mask, not the id, says what is padding."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    # ------------------------------------------------------------------------------------------------------- the rows
    def generation_rows(self, split: str) -> list[GenerationRow]:
        """What is needed to let a model answer the rows of a split and to judge the answers.

        Returns:
            per kept row `prompt_ids`, `prompt` (text), `answer` (the last one), `row` (the original fields) and `index`
            (number of the row in its files).
        """
        tokenizer = self.text_tokenizer
        rows: list[GenerationRow] = []
        for row in self._rows[split].select_columns(["row", "conversation", "row_id"]):
            conversation = Conversation.load(row["conversation"])
            text, ids = tokenizer.prompt(conversation)
            fields = json.loads(row["row"])
            rows.append(
                GenerationRow(prompt_ids=ids, prompt=text, answer=conversation.answer, row=fields, index=row["row_id"])
            )
        return rows

    def conversations(self, split: str, first: int) -> list[Conversation]:
        """The first rows of a split, whatever their form."""
        rows = self._rows[split]
        return [Conversation.load(line) for line in rows.select(range(min(first, len(rows))))["conversation"]]

    def row_locations(self, split: str, row_ids: list[int]) -> list[str]:
        """File and line of the rows with these `row_ids`, for messages."""
        names = dict(zip(self._rows[split]["row_id"][:], self._rows[split]["place"][:], strict=True))
        return [names[row_id] for row_id in row_ids if row_id in names]


class _Prompts:
    def __init__(self, rows: list[GenerationRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> list[GenerationRow]:
        return [self.rows[n] if n >= 0 else {**self.rows[0], "index": n} for n in indices]


def listed(sources: str | list[str] | None) -> list[str]:
    """One source, several or none, as a list of texts."""
    return [sources] if isinstance(sources, str) else [os.fspath(source) for source in sources or []]


def _read_template(template: str | None) -> str | None:
    if template is None or "{" in template:
        return template
    try:
        with open(template, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"chat_template must be a Jinja template or a file that holds one, got {template!r}") from None


def _nothing_left(sources: str, max_length: int, needed: int, all_empty: bool) -> str:
    if all_empty:
        return f"{sources}: every answer is empty"
    if needed > max_length:
        return f"{sources}: no answer begins within max_length={max_length}: it must be at least {needed}"
    return f"{sources}: no answer could be located in what the chat template writes: nothing to learn from"
