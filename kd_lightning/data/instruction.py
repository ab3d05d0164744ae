"""The data module for instructions and conversations: files in, batches of tokens out."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from kd_lightning.data.base import NamesTeacherTokenizer, NamesTokenizer
from kd_lightning.data.row_report import no_usable_rows, report_line, usable_rows
from kd_lightning.data.rows.documents import are_documents, check_one_input, cut_documents
from kd_lightning.data.rows.loaders import BatchLoaders
from kd_lightning.data.rows.teacher_input import RowColumns, TeacherInput, with_teacher_input
from kd_lightning.data.sources import as_list
from kd_lightning.data.text.prompt_notice import COMPARED, prompt_notice
from kd_lightning.data.text.rendering import date_of, read_template, today
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import (
    Reader,
    gather,
    load_tokenizer,
    masked_id,
    read_conversations,
    tokenize_rows,
    with_template,
)
from kd_lightning.distributed.trainer import stage_of
from kd_lightning.schedules import check_flag

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
SHORTEST = 8


class InstructionDataModule(BatchLoaders):
    """Instructions and conversations, as batches in which only the assistant's answers have labels.

    A row is `instruction`, optional `input` and `output` (one user turn: instruction, newline, input); or `prompt` and
    `completion` (plain texts, or lists of messages); or `messages` with several turns, of which every assistant turn
    has labels; or `conversations` in the form of ShareGPT (`from` and `value`); or only `text`: a document, as the
    folder of `.txt` files has them, in which every token has a label but the first. A document ends with the end of
    sequence, if the tokenizer has one, and is cut into windows of `max_length` tokens; a window begins with the last
    token of the window before it, which has its label there, and the last one has what remains (with two tokenizers,
    windows are cut where both have read the same bytes). The columns `tools` and
    `chat_template_kwargs` are passed to the chat template. Turns of the user, the system or a tool never have labels,
    nor do turns with `weight: 0`, `train: false`, `trainable: false` or `loss_mask: 0`; the end of an answer has one.
    Rows without an answer are dropped, longer ones are truncated on the right; both are reported.

    Roles are read without regard to case, as are `human`, `gpt`, `model`, `function_call` and `observation`; others are
    refused unless the template names them. Null and absent fields are the same. Content may be a list of text parts,
    and arguments of tool calls may be JSON text: the template gets the form that it reads.

    Args:
        train: a `.jsonl`, `.json`, `.parquet`, `.csv` or `.tsv` file, a `.txt` file or a folder of them, a folder
            written by `datasets.save_to_disk`, a `datasets` name (`NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`), an
            `asset:` name, or several of these.
        val: the same, for validation.
        test: the same, for test and predict.
        tokenizer: folder, hub name or `asset:` name; in Python also a loaded tokenizer; None: the student's own. The
            attribute of this name holds the loaded tokenizer, from `setup` on.
        batch_size: rows per batch on each rank, at least 1.
        max_length: longest sequence in tokens, at least 8.
        shuffle: a new order of the training rows every epoch; False: file order, rank r of N takes rows r, r + N, ….
        num_workers: processes that read ahead, at least 0.
        group_by_length: rows of similar length share a batch, in shuffled windows; no effect without `shuffle`.
        chat_template: a Jinja template, or a file that holds one, instead of the tokenizer's own.
        chat_template_kwargs: variables for the chat template.
        seed: of the shuffling; None: the run's own (`seed_everything`), or 0 if none is set.
        pin_memory: copy batches to page-locked memory, for a GPU.
        allow_special_tokens: special tokens inside the rows are tokens, for rows that are rendered already; False:
            they are words, and only those of the chat template are tokens.
        date: YYYY-MM-DD, for templates that write the date; None: that of the start, which a resumed run keeps.
        teacher_prompt: what the teacher reads as the last user turn: a format text over the row's fields and `{prompt}`
            (that turn), such as `"{prompt} Solution: {solution}"`; None: what the student reads.
        teacher_chat_template: a Jinja template, or a file that holds one, for the teacher; None: the student's, or with
            two tokenizers that of the teacher's.
        teacher_chat_template_kwargs: variables for the teacher's template, in addition to `chat_template_kwargs`.
        teacher_tokenizer: folder, hub name or `asset:` name of the teacher's tokenizer; in Python also a loaded one;
            None: the teacher's own. With a `RoutedTeacher`, one holds for all teachers, and a mapping has some of them
            by the teacher's name; the others have their own. If it is another one than the student's, the teacher reads
            its own tokens of the same text, and each label of the student has the position of the teacher
            (`teacher_positions`) at which both have read the same bytes.
        batch_tokens: a batch ends at `batch_size` rows or at this number of the student's tokens on each rank,
            whichever comes first; a longer row is a batch by itself. Padding counts as well unless `packing` is set.
            None: no limit.
        packing: both models read the rows of a batch one after the other, without padding. The step is that of the
            padded rows. Models whose layers do not keep packed rows apart are refused when the run starts.

    Attributes:
        report: per split, numbers of `rows`, `kept`, `empty` (no answer), `truncated` (but kept), `cut_away` (no label
            left within `max_length`), and of `unlocated` answers (turns that the template hides, without labels). If
            not 0, also of the names in `EXTRA_NOTES`, such as `excluded` turns (not learned, as the row says).

    Raises:
        ValueError: an argument is out of its range; in `setup`: data that cannot be read, or no row with a label.

    Examples:
        >>> from pathlib import Path
        >>> from kd_lightning import InstructionDataModule
        >>> _ = Path("rows.jsonl").write_text('{"instruction": "Greet me.", "output": "Good day!"}', encoding="utf-8")
        >>> data = InstructionDataModule(train="rows.jsonl", tokenizer="asset:student")
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'labels', 'row_ids', 'source']
        >>> data.tokenizer.decode(batch["labels"][batch["labels"] != -100])  # only the answer has labels
        'Good day!<eos>'
    """

    read: Reader | None = None  # turns files into rows; None: instructions and conversations

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
        allow_special_tokens: bool = False,
        date: str | None = None,
        teacher_prompt: str | None = None,
        teacher_chat_template: str | None = None,
        teacher_chat_template_kwargs: dict[str, Any] | None = None,
        teacher_tokenizer: dict[str, str] | str | None = None,
        batch_tokens: int | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, SHORTEST)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        check_flag("packing", packing)
        if batch_tokens is not None and (not isinstance(batch_tokens, int) or batch_tokens < 1):
            raise ValueError(f"batch_tokens must be an integer of at least 1 or None, got {batch_tokens!r}")
        self.train, self.val, self.test = train, val, test
        self.sources = {"train": as_list(train), "val": as_list(val), "test": as_list(test)}
        if not self.sources["train"]:
            raise ValueError(f"train must name at least one file, folder or data set, got {train!r}")
        self.tokenizer_source: str | PreTrainedTokenizerBase | None = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.batch_size = batch_size
        self.max_length = max_length
        self.batch_tokens, self.packing = batch_tokens, packing
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.group_by_length = group_by_length
        self.chat_template = read_template(chat_template)
        self.chat_template_kwargs = chat_template_kwargs
        self.seed = seed
        self.pin_memory = pin_memory
        self.allow_special_tokens = allow_special_tokens
        self.date = today() if date is None else f"{date_of(date):%Y-%m-%d}"
        template = read_template(teacher_chat_template, "teacher_chat_template")
        self.teacher_input = TeacherInput(teacher_prompt, template, teacher_chat_template_kwargs)
        self.teacher_tokenizer_source = teacher_tokenizer

    # ---------------------------------------------------------------------------------------------------- preparation
    def prepare_data(self) -> None:
        """Tokenize once per machine; the other ranks then find the result in the cache of `datasets`."""
        self.setup(stage_of(self.trainer))

    def setup(self, stage: str) -> None:
        """Load tokenizer and rows of the splits that `stage` needs."""
        module: object = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, NamesTokenizer):
            self.use_tokenizer_of(module.tokenizer_name)
        if isinstance(module, NamesTeacherTokenizer):
            self.use_teacher_tokenizer_of(module.teacher_tokenizer_name)
        if not self.load_tokenizers():
            raise ValueError(
                "tokenizer must be given if the student was passed as an object without a folder or hub name, got None"
            )
        for split in SPLITS.get(stage, ("train", "val", "test")):
            if self.sources[split] and split not in self._rows:
                self._rows[split] = self.load_split(split)
                self._notice_prompts(split)

    def load_tokenizers(self) -> bool:
        """Load the tokenizers of student and teacher without any rows; False: the student's is not known."""
        if self.tokenizer_source is None:
            return False
        # forked workers must not inherit the tokenizer's threads
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self._tokenizer is None:
            self._tokenizer = with_template(load_tokenizer(self.tokenizer_source), self.chat_template, rank_zero_info)
        self.load_teacher_tokenizer()
        return True

    def _notice_prompts(self, split: str) -> None:
        rows = self.conversations(split, COMPARED) if split == "train" else []
        if notice := prompt_notice(self.text_tokenizer, rows):
            rank_zero_info(notice)

    def use_tokenizer_of(self, model: str | None) -> None:
        """Load the tokenizer of this model in `setup`, unless the data module was given a tokenizer."""
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
        """How rows become token ids: tokenizer, chat template and maximum length."""
        return TextTokenizer(
            self.tokenizer,
            self.chat_template,
            self.chat_template_kwargs,
            self.max_length,
            self.allow_special_tokens,
            self.date,
        )

    def use_date(self, date: str) -> None:
        """Tokenize the loaded splits again if the chat template writes another date."""
        if date != self.date:
            self.date = date
            self._rows = {split: self.load_split(split) for split in self._rows}

    def load_split(self, split: str) -> Any:
        """Read and tokenize a split, and fill `report[split]`; a subclass with other rows overrides it.

        Returns:
            a `datasets.Dataset` with the columns of `tokenized`.
        """
        rows = gather(
            self.read or read_conversations,
            split,
            {"sources": self.sources[split]},
            roles=self.text_tokenizer.own_roles,
        )
        return self.keep_usable(split, self.tokenized(rows, split))

    def tokenized(self, rows: Any, split: str) -> Any:
        """Rows with a `conversation`, with the columns of their tokens, also in the teacher's own input."""
        if are_documents(rows):
            check_one_input(self.teacher_input, self.sources[split])
            if self.several_tokenizers:
                raise ValueError(
                    f"data.{split}: documents (rows with 'text') need teachers with one tokenizer: train with each of "
                    "these in a run of its own"
                )
            teacher = self.teacher_text_tokenizer if self.has_two_tokenizers else None
            return cut_documents(rows, split, self.text_tokenizer, teacher)
        found = tokenize_rows(rows, split, self.text_tokenizer)
        if not self.teacher_has_own_input:
            return found
        return with_teacher_input(found, split, self.input_of_rows, self.text_tokenizer)

    @property
    def add_teacher_input(self) -> RowColumns | None:
        """Adds the teacher's own input to a tokenized row; None if it has none."""
        return self.input_of_rows.adder(self.text_tokenizer) if self.teacher_has_own_input else None

    def keep_usable(self, split: str, rows: Any) -> Any:
        """The rows that can be trained on; the others are counted in `report[split]`.

        Raises:
            ValueError: there are none.
        """
        kept, self.report[split] = usable_rows(rows, self.max_length)
        rank_zero_info(report_line(split, self.report[split], self.max_length))
        if not kept:
            raise no_usable_rows(self.sources[split], rows, self.max_length)
        return rows.select(kept)

    @property
    def pad_id(self) -> int:
        """The token id of padding; the attention mask, not the id, marks what is padding."""
        return masked_id(self.tokenizer)
