"""The order of rows: which rank reads which row in which batch, and how a loader resumes in the middle of a pass."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from kd_lightning.data.collate import FILLER
from kd_lightning.distributed.trainer import data_parallel_rank, limit_batches

WINDOW_ROWS = 1024
WINDOW_BATCHES = 32
DRAWS = 16  # orders of a pass that are tried until one has no more batches than the first pass


class BatchOrder(DistributedSampler[list[int]]):
    """Batches of row indices for one rank; they depend on (seed, epoch) alone.

    All ranks split the same order into global batches of `batch_size · world_size` rows; rank r of N takes the rows
    r, r + N, … of each. Hence without shuffling rank r reads the rows r, r + N, … of the file, no row is on two ranks,
    and every rank has the same number of batches. Lightning does not replace it, because it is a `DistributedSampler`.

    With `batch_tokens` a global batch ends before the row with which a batch of a rank would have more tokens. A row
    that is longer is a batch by itself. Every pass has as many batches as the first one, because Lightning reads the
    number once: of several orders the first that needs no more is taken, and some of its batches are halved.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch and rank, at most.
        shuffle: a new order every epoch; False: file order.
        group_by_length: rows of similar length share a batch. With `shuffle`: within windows of the shuffled order,
            whose batches are then shuffled. Without: the whole file, longest first.
        fill: for a last global batch with fewer rows than ranks. True: ranks without a row get a batch without labels;
            False: it is left out.
        batch_tokens: tokens per batch and rank, at most; None: no limit.
        packed: tokens are counted without padding; False: rows times the longest of them.
        seed: of the shuffling.
        rank: of this process.
        world_size: number of processes that share the rows.

    Attributes:
        pass_length: batches read in a pass, if fewer than there are (`limit_pass`).

    Raises:
        ValueError: there are fewer rows than ranks, and `fill` is False.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = False,
        group_by_length: bool = False,
        fill: bool = False,
        batch_tokens: int | None = None,
        packed: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not fill and len(lengths) < world_size:
            raise ValueError(
                f"the training data has {len(lengths)} rows, fewer than the {world_size} ranks: use fewer devices or "
                "more rows"
            )
        super().__init__(lengths, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = torch.as_tensor(lengths, dtype=torch.long)
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.fill = fill
        self.batch_tokens, self.packed = batch_tokens, packed
        self.start = 0
        self.pass_length: int | None = None
        self.announce: Callable[[list[int]], None] | None = None  # called with the rows of the batch after the next

    def __len__(self) -> int:
        if self.batch_tokens is not None:
            return self._batches_of_first_pass
        whole, rest = divmod(len(self.lengths), self.batch_size * self.num_replicas)
        return whole + int(rest > 0 and (self.fill or rest >= self.num_replicas))

    @functools.cached_property
    def _batches_of_first_pass(self) -> int:
        return len(self._draw(_mix(self.seed, 0)))

    def __iter__(self) -> Iterator[list[int]]:
        """This epoch's batches; an iterator with `state_dict` and `load_state_dict`."""
        return _BatchIterator(self, self.epoch, self.start)

    def start_at(self, epoch: int, batch: int) -> None:
        """Make the next pass that of `epoch`, from batch number `batch` on."""
        self.epoch, self.start = epoch, batch

    def limit_pass(self, batches: int) -> None:
        """Set the number of batches that are read in a pass; a loader saved there resumes with the next pass."""
        self.pass_length = batches

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the number of tokens of each row, from the next pass on.

        Raises:
            ValueError: there is a limit of tokens, so that the number of batches would change between two passes.
        """
        if self.batch_tokens is not None:
            raise ValueError(
                f"batch_tokens must be None if responses change between two passes over the data, because the number "
                f"of batches would change, got {self.batch_tokens}"
            )
        self.lengths = torch.as_tensor(lengths, dtype=torch.long)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the loader counts the passes, because Lightning's epoch skips a number when a run resumes."""

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of this rank in `epoch`."""
        own = [block[self.rank :: self.num_replicas].tolist() for block in self._global_batches(epoch)]
        return [rows or [FILLER] for rows in own]

    def _global_batches(self, epoch: int) -> list[torch.Tensor]:
        if self.batch_tokens is None or not self.shuffle:
            return self._draw(_mix(self.seed, epoch))
        for attempt in range(DRAWS):
            seed = _mix(self.seed, epoch)
            blocks = self._halved(self._draw(_mix(seed, attempt) if attempt else seed))
            if len(blocks) == len(self):
                return blocks
        blocks = self._draw(_mix(self.seed, 0))
        return _shuffled(blocks, torch.Generator().manual_seed(_mix(self.seed, epoch)))

    def _draw(self, seed: int) -> list[torch.Tensor]:
        """Global batches of an order."""
        size = self._rows_per_global_batch()
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.lengths), generator=generator)
        else:
            generator = None
            order = torch.arange(len(self.lengths))
        if not self.group_by_length or len(order) == 0:
            blocks = self._split(order)
        elif generator is None:
            blocks = self._split(self._by_length(order))
        else:
            # shortest first, so that a short last batch holds the longest rows
            windows = torch.split(order, size * max(WINDOW_BATCHES, -(-WINDOW_ROWS // size)))
            inside = [self._by_length(window).flip(0) for window in windows]
            if self.batch_tokens is None:
                blocks = [block for window in inside for block in _shuffled(self._split(window), generator)]
            else:  # batches across the ends of windows, where every other one is reversed: the lengths are similar
                rows = torch.cat([window.flip(0) if n % 2 else window for n, window in enumerate(inside)])
                blocks = _shuffled(self._split(rows), generator)
        return [block for block in blocks if self.fill or len(block) >= self.num_replicas]

    def _rows_per_global_batch(self) -> int:
        """Rows of a global batch; with a limit of tokens, about as many."""
        rows = self.batch_size
        if self.batch_tokens is not None and len(self.lengths):
            rows = max(1, min(rows, self.batch_tokens // max(1, int(self.lengths.median()))))
        return rows * self.num_replicas

    def _split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows as global batches, in their order."""
        ranks, limit = self.num_replicas, self.batch_tokens
        if limit is None:
            return list(torch.split(rows, self.batch_size * ranks))
        ends, held = [0], [(0, 0)] * ranks  # of each rank's batch: all its tokens, and its longest row
        for n, length in enumerate(self.lengths[rows].tolist()):
            before, rank = divmod(n - ends[-1], ranks)
            total, longest = held[rank][0] + length, max(held[rank][1], length)
            tokens = total if self.packed else (before + 1) * longest
            if before and (before == self.batch_size or tokens > limit):
                ends.append(n)
                held, rank, total, longest = [(0, 0)] * ranks, 0, length, length
            held[rank] = (total, longest)
        ends = [*ends, len(rows)] if len(rows) else [0]
        return [rows[start:end] for start, end in itertools.pairwise(ends)]

    def _halved(self, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Global batches, of which the largest are halved until there are as many as in the first pass."""
        ranks = self.num_replicas
        while 0 < len(blocks) < len(self):
            largest = max(range(len(blocks)), key=lambda n: len(blocks[n]))
            block, half = blocks[largest], len(blocks[largest]) // (2 * ranks) * ranks
            if not half:
                break
            blocks = [*blocks[:largest], block[:half], block[half:], *blocks[largest + 1 :]]
        return blocks

    def _by_length(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.argsort(self.lengths[rows], descending=True, stable=True)]


class _BatchIterator(Iterator[list[int]]):
    def __init__(self, order: BatchOrder, epoch: int, position: int) -> None:
        self.order = order
        self._move(epoch, position)

    def _move(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self.batches = self.order.batches(epoch)

    def __next__(self) -> list[int]:
        if self.position >= len(self.batches):
            raise StopIteration
        self.position += 1
        if self.order.announce is not None and self.position < len(self.batches):
            self.order.announce(self.batches[self.position])
        return self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._move(state["epoch"], state["position"])


class ResumableLoader(StatefulDataLoader):  # type: ignore[misc]
    """A `StatefulDataLoader` that counts its passes; each has the order of its `BatchOrder` for that number.

    A new iterator starts the next pass once a batch of the present one was read. The state holds pass and batch in
    addition to torchdata's own state, so that a run can resume with another number of workers.
    """

    @functools.wraps(StatefulDataLoader.__init__)  # type: ignore[misc]  # Lightning reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's own call
            super().__init__(*args, **kwargs)
        self._first = 0  # the batch that the present iterator began with
        self._before_pass: Callable[[int], None] | None = None

    def look_ahead(self, callback: Callable[[Any], None]) -> None:
        """Call `callback(batch)` with the next batch of the pass whenever a batch is read; the state is unaffected."""
        order, collate = self.sampler, self.collate_fn
        if isinstance(order, BatchOrder):
            order.announce = lambda rows: callback(collate(self.dataset[rows]))

    def call_before_pass(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pass_number)` before the order of a pass is made and its first row is read.

        The callback may change rows and lengths. In the first epoch of a process, Lightning creates the iterator
        before `on_train_epoch_start`, so that hook would be too late.
        """
        self._before_pass = callback

    def __iter__(self) -> Iterator[Any]:
        """The present pass if no batch of it was read yet, else the next one."""
        order = self.sampler
        if isinstance(order, BatchOrder) and self.next_iter_state is None:
            if self._iterator is not None and self._iterator._num_yielded > 0:
                order.start_at(self._iterator._sampler_iter.epoch + 1, 0)
            self._first = order.start
            if self._before_pass is not None:
                self._before_pass(order.epoch)
        return super().__iter__()  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """The position of this loader: plain numbers, dicts and tensors."""
        state = super().state_dict()
        iterator = self._iterator
        position = iterator._sampler_iter
        return {
            "num_workers": self.num_workers,
            "epoch": position.epoch if isinstance(position, _BatchIterator) else 0,
            "first": self._first,
            "batches": self._first + iterator._num_yielded,
            "torchdata": state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken; with the next pass if that one was complete."""
        order = self.sampler
        if isinstance(order, BatchOrder) and state_dict["batches"] >= (order.pass_length or len(order)):
            super().load_state_dict({})  # else Lightning would read the rest of the old pass: an epoch without batches
            order.start_at(state_dict["epoch"] + 1, 0)
        elif state_dict["num_workers"] == self.num_workers:
            super().load_state_dict(state_dict["torchdata"])
            self._first = state_dict["first"]
        else:
            super().load_state_dict({})
            order.start_at(state_dict["epoch"], state_dict["batches"])


def limited(batches: int, limit: int | float) -> int:
    """Number of batches that a `limit_..._batches` of the Trainer leaves: a number (int) or a share (float)."""
    return int(limit * batches) if isinstance(limit, float) else min(limit, batches)


def batches_in_pass(rows: int, batch_size: int, trainer: Trainer) -> int:
    """Batches of one rank in a pass over so many training rows."""
    ranks = data_parallel_rank(trainer)[1]
    found = len(BatchOrder([1] * rows, batch_size, world_size=ranks))
    return limited(found, limit_batches(trainer, "train"))


def _shuffled(blocks: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    return [blocks[n] for n in torch.randperm(len(blocks), generator=generator).tolist()]


def _mix(seed: int, epoch: int) -> int:
    # neighboring seeds and epochs share no order; with seed + epoch, (0, 1) and (1, 0) would
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xC2B2AE3D27D4EB4F + 1) % 2**63
