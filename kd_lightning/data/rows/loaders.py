"""The loaders of tokenized rows: their order, their workers, and how rows become batches."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor

from kd_lightning.data.collate import SIDES, Collator, PromptCollator, PromptRows, TokenRows
from kd_lightning.data.rows.tokenized_splits import TokenizedSplits
from kd_lightning.data.sampler import BatchOrder, ResumableLoader, limited
from kd_lightning.distributed.trainer import completed_epochs, data_parallel_rank, is_overfitting, limit_batches
from kd_lightning.seeding import run_seed


class BatchLoaders(TokenizedSplits, ABC):
    """A data module of tokenized data sets, with its loaders.

    Attributes:
        shuffle: whether the training rows have a new order in every epoch.
        num_workers: processes that read ahead.
        group_by_length: whether rows of similar length share a batch; only with `shuffle`.
        seed: of the shuffling; None: the run's own.
        pin_memory: whether batches are copied to page-locked memory.
    """

    shuffle: bool
    num_workers: int
    group_by_length: bool
    seed: int | None
    pin_memory: bool

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank, in an order that depends on (seed, epoch) and resumes from a checkpoint."""
        if is_overfitting(self.trainer):  # Lightning expects a plain loader in file order then
            return self._plain_loader("train")
        loader = self._loader("train", shuffle=self.shuffle, grouped=self.group_by_length and self.shuffle, fill=False)
        loader.sampler.start_at(completed_epochs(self.trainer), 0)  # loaders may be rebuilt in every epoch
        loader.sampler.limit_pass(limited(len(loader), limit_batches(self.trainer, "train")))
        return loader

    def val_dataloader(self) -> ResumableLoader | list[dict[str, Tensor]]:
        """Every row once over all ranks, in file order; longest first if all are read and `group_by_length`."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> ResumableLoader | list[dict[str, Tensor]]:
        """Every row once over all ranks, in file order; longest first if all are read and `group_by_length`."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Prompts of the test rows in file order, padded on the left; `row_ids` number the rows of the file.

        Raises:
            ValueError: the test rows are documents, which have no prompts.
        """
        prompts = self.generation_rows("test")
        if not prompts:
            raise ValueError(
                f"{', '.join(self.sources['test'])}: predict needs prompts, and documents (rows with 'text') have none"
            )
        rank, world_size = data_parallel_rank(self.trainer)
        lengths = [len(row["prompt_ids"]) for row in prompts]
        order = BatchOrder(
            lengths, self.batch_size, fill=True, batch_tokens=self.batch_tokens, rank=rank, world_size=world_size
        )
        loader: ResumableLoader = ResumableLoader(
            PromptRows(prompts), batch_size=None, sampler=order, collate_fn=PromptCollator(self.pad_id)
        )
        return loader

    def every_row(self, split: str) -> ResumableLoader:
        """Every row of a split once over all ranks, with the same number of batches on each rank; longest first."""
        return self._loader(split, shuffle=False, grouped=True, fill=True, ahead=False)

    def dataset(self, split: str) -> Any:
        """The tokenized rows of a split, for a loader or a trainer of one's own; `collate` makes batches of them.

        Args:
            split: train, val or test; call `setup` first.

        Raises:
            ValueError: the split is not loaded.
        """
        if split not in self._rows:
            loaded = ", ".join(self._rows) or "none"
            raise ValueError(f"split must be one that `setup` has loaded ({loaded}), got {split!r}")
        return self.token_rows(split)[0]

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Rows of `dataset` as one batch: `input_ids`, `attention_mask` and `labels` [B, T], padded on the right."""
        return Collator(self.pad_id, teacher_pad_id=self.teacher_pad_id)(rows)

    def token_rows(self, split: str) -> tuple[Any, list[int]]:
        """The data set that batches of a split are read from, and the number of tokens of each row."""
        return TokenRows(self._rows[split]), self.row_lengths(split)

    def row_lengths(self, split: str) -> list[int]:
        """The number of tokens of each row of a split, which is loaded and tokenized."""
        lengths: list[int] = self._rows[split]["length"][:]
        return lengths

    def token_limit(self, split: str) -> int | None:
        """Tokens of a batch of a split on each rank, at most; None: no limit."""
        return self.batch_tokens

    def training_order(self, trainer: L.Trainer | None) -> BatchOrder:
        """Which training row is in which batch of a rank.

        Args:
            trainer: of the run, which knows the ranks.
        """
        grouped = self.group_by_length and self.shuffle
        return self._batch_order("train", self.row_lengths("train"), self.shuffle, grouped, fill=False, trainer=trainer)

    def batches_per_pass(self, trainer: L.Trainer) -> int | None:
        """Batches of a rank in one pass over the training data; None: not known, as the rows are not loaded.

        With `batch_tokens` it is also not known as long as responses are missing.

        Args:
            trainer: of the run; its `limit_train_batches` counts.
        """
        if self.batch_tokens is None:
            return super().batches_per_pass(trainer)
        if "train" not in self._rows or any(self.missing_responses(side) for side in SIDES):
            return None
        return limited(len(self.training_order(trainer)), limit_batches(trainer, "train"))

    def _evaluation_loader(self, split: str) -> ResumableLoader | list[dict[str, Tensor]]:
        if split not in self._rows:
            return []
        if is_overfitting(self.trainer):
            return self._plain_loader(split)
        all_rows = limit_batches(self.trainer, split) == 1.0  # the longest rows would be a biased sample of the split
        grouped = self.group_by_length and self.shuffle and all_rows
        return self._loader(split, shuffle=False, grouped=grouped, fill=True)

    def _loader(self, split: str, shuffle: bool, grouped: bool, fill: bool, ahead: bool = True) -> ResumableLoader:
        rows, lengths = self.token_rows(split)
        order = self._batch_order(split, lengths, shuffle, grouped, fill, self.trainer)
        loader: ResumableLoader = ResumableLoader(
            rows,
            batch_size=None,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=self._collator(split),
            pin_memory=self.pin_memory,
        )
        return self.with_look_ahead(loader) if ahead else loader

    def _batch_order(
        self, split: str, lengths: list[int], shuffle: bool, grouped: bool, fill: bool, trainer: L.Trainer | None
    ) -> BatchOrder:
        rank, world_size = data_parallel_rank(trainer)
        return BatchOrder(
            lengths,
            self.batch_size,
            shuffle=shuffle,
            group_by_length=grouped,
            fill=fill,
            batch_tokens=self.token_limit(split),
            packed=self.packing,
            seed=run_seed() if self.seed is None else self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _plain_loader(self, split: str) -> ResumableLoader:
        rows, _ = self.token_rows(split)
        loader: ResumableLoader = ResumableLoader(rows, batch_size=self.batch_size, collate_fn=self._collator(split))
        return loader

    def _collator(self, split: str) -> Collator:
        return Collator(self.pad_id, self.index_columns(split), self.teacher_pad_id)
