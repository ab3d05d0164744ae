"""A teacher's LM head that is sharded over ranks, with another vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import processes
from kd_lightning import DistillationLoss, Head, ReverseKL, VocabularyMap

VS, VT, K = 9, 12, 5


def losses(rank: int) -> dict[str, Tensor]:
    """Value and gradient with the whole head and with one shard of it on each rank."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=g).requires_grad_(), torch.randn(VS, 4, generator=g)
    teacher, other, bias = (torch.randn(*shape, generator=g) for shape in ((2, 3, 5), (VT, 5), (VT,)))
    student_ids, teacher_ids = (torch.randperm(size, generator=g)[:K] for size in (VS, VT - 1))  # one column of padding
    found = VocabularyMap(student_ids, teacher_ids, VS, VT - 1)
    labels, loss = torch.zeros(2, 3, dtype=torch.int64), DistillationLoss(ReverseKL(), temperature=2.0)
    own = slice(rank * VT // 2, (rank + 1) * VT // 2)
    results = {}
    for name, head in (
        ("whole", Head(other, bias, 0.5, 3.0)),
        ("sharded", Head(other[own], bias[own], 0.5, 3.0, dist.group.WORLD)),
    ):
        value = loss.from_hidden(hidden, weight, teacher, head, labels, vocabulary_map=found).mean
        results |= {name: value.detach(), f"{name} gradient": torch.autograd.grad(value, hidden)[0]}
    return results


def test_a_sharded_head_equals_a_whole_one() -> None:
    for result in processes.run(losses):
        torch.testing.assert_close(result["sharded"], result["whole"])
        torch.testing.assert_close(result["sharded gradient"], result["whole gradient"])
