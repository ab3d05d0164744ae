"""Which row is in which batch: every row once, the same on every rank, and a pass goes on where it was left."""

from __future__ import annotations

import random
from typing import Any

import pytest
from torch.utils.data import Dataset

from kd_lightning.data.collate import FILLER
from kd_lightning.data.sampler import BatchOrder, ResumableLoader

LENGTHS = random.Random(7).choices(range(5, 90), k=2500)


def ranks(count: int, lengths: list[int] = LENGTHS, **kwargs: Any) -> list[BatchOrder]:
    return [BatchOrder(lengths, 8, rank=rank, world_size=count, **kwargs) for rank in range(count)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [2500, 2496, 17, 8, 3])
def test_one_rank_reads_every_row_once(rows: int, shuffle: bool, grouped: bool) -> None:
    order = BatchOrder(LENGTHS[:rows], 8, shuffle=shuffle, group_by_length=grouped)
    batches = list(order)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert len(batches) == len(order) == -(-rows // 8)
    assert max(map(len, batches)) <= 8


@pytest.mark.parametrize("rows", [2500, 49, 33, 4, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_ranks_share_no_row_and_have_the_same_number_of_batches(rows: int, shuffle: bool) -> None:
    count = 3
    orders = ranks(count, LENGTHS[:rows], shuffle=shuffle, group_by_length=shuffle)
    batches = [list(order) for order in orders]
    assert {len(ours) for ours in batches} == {len(orders[0])}
    seen = [row for ours in batches for batch in ours for row in batch]
    assert len(seen) == len(set(seen)) > rows - count
    assert all(batch and FILLER not in batch for ours in batches for batch in ours)


@pytest.mark.parametrize("rows", [2500, 50, 33, 25, 2, 1])
def test_evaluation_ranks_read_every_row_once_and_fill_up(rows: int) -> None:
    batches = [list(order) for order in ranks(3, LENGTHS[:rows], fill=True, group_by_length=True)]
    assert len({len(ours) for ours in batches}) == 1
    seen = [row for ours in batches for batch in ours for row in batch if row != FILLER]
    assert sorted(seen) == list(range(rows))


def test_without_shuffling_a_rank_reads_the_file_in_order() -> None:
    for rank, order in enumerate(ranks(3, LENGTHS[:51])):
        assert [row for batch in order for row in batch] == list(range(rank, 51, 3))


def test_two_ranks_together_read_the_batches_of_one() -> None:
    alone = BatchOrder(LENGTHS, 16, shuffle=True, group_by_length=True)
    both = [BatchOrder(LENGTHS, 8, shuffle=True, group_by_length=True, rank=r, world_size=2) for r in range(2)]
    for whole, first, second in zip(alone, *both, strict=True):
        assert sorted(whole) == sorted(first + second)


def test_grouping_saves_padding_and_still_shuffles() -> None:
    def padded(order: BatchOrder) -> int:
        return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in order)

    plain = BatchOrder(LENGTHS, 8, shuffle=True)
    grouped = BatchOrder(LENGTHS, 8, shuffle=True, group_by_length=True)
    assert padded(grouped) < 1.1 * sum(LENGTHS) < padded(plain)
    firsts = [LENGTHS[batch[0]] for batch in grouped][:100]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


def test_evaluation_begins_with_the_longest_rows() -> None:
    longest = [max(LENGTHS[row] for row in batch) for batch in BatchOrder(LENGTHS, 8, group_by_length=True)]
    assert longest == sorted(longest, reverse=True)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def first(seed: int, epoch: int) -> list[list[int]]:
        order = BatchOrder(LENGTHS, 8, shuffle=True, group_by_length=True, seed=seed)
        order.start_at(epoch, 0)
        return list(order)

    assert first(0, 1) == first(0, 1)
    assert len({str(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_fewer_rows_than_ranks() -> None:
    with pytest.raises(ValueError, match="2 rows, fewer than the 3 ranks"):
        ranks(3, [5, 6])


class Squares(Dataset[list[int]]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, rows: list[int]) -> list[int]:
        return [row * row for row in rows]


def loader(workers: int, epoch: int = 0) -> ResumableLoader:
    order = BatchOrder(LENGTHS[:100], 8, shuffle=True, group_by_length=True)
    order.start_at(epoch, 0)
    return ResumableLoader(Squares(), batch_size=None, sampler=order, num_workers=workers, collate_fn=list)


def passes(*epochs: int) -> list[list[list[int]]]:
    return [list(loader(0, epoch)) for epoch in epochs]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_counts_its_passes(workers: int) -> None:
    ours = loader(workers)
    iter(ours)  # a pass of which nothing is read is no pass
    ours.sampler.set_epoch(7)  # nor does anybody else count
    read = [list(ours), list(ours)]
    next(iter(ours))
    assert [*read, list(ours)] == passes(0, 1, 3)


@pytest.mark.parametrize("read", [0, 5])
@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (2, 0), (0, 2)])
def test_a_loader_resumes_where_another_stopped(workers: tuple[int, int], read: int) -> None:
    before, after = workers
    present, following = passes(4, 5)
    left = loader(before, epoch=4)
    iterator = iter(left)
    assert [next(iterator) for _ in range(read)] == present[:read]
    resumed = loader(after)
    resumed.load_state_dict(left.state_dict())
    iterator = iter(resumed)
    assert [next(iterator) for _ in range(3)] == present[read : read + 3]
    again = loader(before)  # interrupted once more
    again.load_state_dict(resumed.state_dict())
    assert list(again) == present[read + 3 :]
    assert list(again) == following


@pytest.mark.parametrize("length", [None, 6])
def test_a_finished_pass_is_followed_by_the_next(length: int | None) -> None:
    present, following = passes(4, 5)
    left = loader(0, epoch=4)
    iterator = iter(left)
    for _ in range(length or len(present)):
        next(iterator)
    resumed = loader(0)
    resumed.sampler.limit_pass(length)
    resumed.load_state_dict(left.state_dict())
    assert list(resumed) == following


def tokens_of(batch: list[int], packed: bool) -> int:
    lengths = [LENGTHS[row] for row in batch]
    return sum(lengths) if packed else len(lengths) * max(lengths)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_limit_of_tokens(count: int, grouped: bool, packed: bool) -> None:
    kwargs: dict[str, Any] = {"shuffle": True, "group_by_length": grouped, "batch_tokens": 200, "packed": packed}
    orders = ranks(count, LENGTHS, **kwargs)
    for epoch in range(4):
        batches = [order.batches(epoch) for order in orders]
        assert {len(own) for own in batches} == {len(orders[0])}  # the same in every pass and on every rank
        seen = [row for own in batches for batch in own for row in batch]
        assert len(seen) == len(set(seen)) > len(LENGTHS) - count
        assert all(len(batch) <= 8 and tokens_of(batch, packed) <= 200 for own in batches for batch in own)
        rounds = [list(map(len, step)) for step in zip(*batches, strict=True)]
        assert all(max(sizes) - min(sizes) <= 1 and min(sizes) > 0 for sizes in rounds)
    assert orders[0].batches(0) != orders[0].batches(1)
    full = sum(tokens_of(batch, packed) for batch in orders[0].batches(0)) / len(orders[0])
    assert full > 200 * (0.75 if count == 1 else 0.6)


def test_a_row_above_the_limit_is_a_batch_by_itself() -> None:
    assert BatchOrder([9, 3, 3, 3, 12, 2], 8, batch_tokens=6).batches(0) == [[0], [1, 2], [3], [4], [5]]
    assert BatchOrder([9, 3, 3, 3, 12, 2], 8, batch_tokens=6, packed=True).batches(0) == [[0], [1, 2], [3], [4], [5]]
    assert BatchOrder([4, 1, 1, 1], 8, batch_tokens=7, packed=True).batches(0) == [[0, 1, 2, 3]]
    assert BatchOrder([4, 1, 1, 1], 8, batch_tokens=7).batches(0) == [[0], [1, 2, 3]]
    assert BatchOrder([4, 1, 1, 1], 2, batch_tokens=100).batches(0) == [[0, 1], [2, 3]]  # rows are limited as well
    assert BatchOrder([], 8, batch_tokens=6, fill=True).batches(0) == []


def test_lengths_cannot_change_under_a_limit_of_tokens() -> None:
    with pytest.raises(ValueError, match="batch_tokens must be None if responses change"):
        BatchOrder(LENGTHS, 8, batch_tokens=100).set_lengths(LENGTHS)


@pytest.mark.parametrize("workers", [(0, 0), (2, 0)])
def test_a_loader_with_a_limit_of_tokens_resumes_where_another_stopped(workers: tuple[int, int]) -> None:
    def limited_loader(count: int) -> ResumableLoader:
        order = BatchOrder(LENGTHS[:100], 8, shuffle=True, group_by_length=True, batch_tokens=150)
        return ResumableLoader(Squares(), batch_size=None, sampler=order, num_workers=count, collate_fn=list)

    ours = limited_loader(workers[0])
    assert len(list(ours)) == len(ours)
    expected = limited_loader(0)
    expected.sampler.start_at(1, 0)
    rest = list(expected)
    iterator = iter(ours)
    for _ in range(5):
        next(iterator)
    state, resumed = ours.state_dict(), limited_loader(workers[1])
    resumed.load_state_dict(state)
    assert list(resumed) == rest[5:]
