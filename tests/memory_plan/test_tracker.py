"""Bytes are counted from first use to end, once, whatever looks at them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kd_lightning.memory_plan.tracker import ELSEWHERE, Tracker, format_bytes, nbytes


@pytest.mark.parametrize("fake", [False, True])
def test_storages_live_and_die(fake: bool) -> None:
    tracker = Tracker(FakeTensorMode(allow_non_fake_inputs=True) if fake else None)
    with tracker:
        one = torch.zeros(1000)
        view = one[10:].view(-1, 9)
        assert (tracker.total, tracker.peak) == (4000, 4000)
        two = one + 1
        assert isinstance(two, FakeTensor) == fake
        del one
        assert tracker.total == 8000  # the view is still there
        del view
        assert tracker.total == 4000
        two.untyped_storage().resize_(400)
        assert (tracker.total, tracker.now["gathered"]) == (400, 400)
        del two
    assert (tracker.total, tracker.peak) == (0, 8000)
    assert (tracker.most["activations"], tracker.most["gathered"]) == (8000, 400)


def test_names_and_other_places() -> None:
    weight, state = torch.zeros(10), torch.zeros(5)
    tracker = Tracker(widths={80: "tiles"})
    tracker.hold("parameters", [weight, weight[2:]])
    tracker.hold(ELSEWHERE, [state])
    with tracker:
        tile = torch.empty(2, 80)
        tracker.add("buckets", 7)
        assert tracker.now == {"parameters": 40, ELSEWHERE: 20, "tiles": 640, "buckets": 7}
        assert tracker.total == 687
        tracker.hold("kept", [tile])
    assert (tracker.now["tiles"], tracker.now["kept"], tracker.total) == (0, 640, 687)
    assert nbytes([weight, weight[2:], state]) == 60


def test_integers_stay_what_they_are_beside_shapes() -> None:
    with Tracker(FakeTensorMode(allow_non_fake_inputs=True)):
        index = torch.tensor([1, -100, 2]).ne(-100).nonzero().squeeze(1)
        assert index.tolist() == [0, 2]
        assert torch.empty(3, 4).index_select(0, index).shape == (2, 4)
        step = torch.tensor(0.0)
        step += 1
        assert step.item() == 1.0


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (80 << 30, "80 GiB"), (333 << 20, "333 MiB")],
)
def test_bytes_in_words(size: int, words: str) -> None:
    assert format_bytes(size) == words
