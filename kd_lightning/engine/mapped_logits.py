r"""A teacher with another tokenizer: its logits at the student's columns, and what it gives to all other tokens.

A chunk holds the teacher's logit of the partner of each of the student's tokens. Where both sides have tokens without a
partner, the teacher's are projected in blocks and reduced to two kinds of columns of the tokens: their largest logit
and, per temperature, \(\log \sum_u e^{(x_u - \max x)/t}\). No third buffer of the width of a vocabulary is needed.
`SharedOutcomes` makes a distribution of both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kd_lightning.engine.block_logits import OUTSIDE_SUM, OUTSIDE_TOP, REST_TOP, rest_sum
from kd_lightning.engine.head import Transform, apply_transform
from kd_lightning.engine.logit_source import UPCAST_ROWS, DifferentiableLogits, LogitSource
from kd_lightning.engine.vocabulary_map import VocabularyMap


class MappedLogits(LogitSource):
    """A teacher's logits at the columns of the student.

    Args:
        teacher: its logits at its own columns.
        vocabulary_map: the tokens that both models share, on the device of the logits.
    """

    measures_share = True

    def __init__(self, teacher: DifferentiableLogits, vocabulary_map: VocabularyMap) -> None:
        self.teacher, self.map = teacher, vocabulary_map
        self.vocabulary = vocabulary_map.student_size
        self.transform = (1.0, None)
        self.inputs = teacher.inputs
        self.others = vocabulary_map.student_rest if vocabulary_map.student_unmapped else None

    def fill(self, chunk: Tensor, start: int, stop: int, student: tuple[Tensor, Transform] | None = None) -> None:
        """Write the logits of the tokens start to stop; −inf for the student's tokens without a partner."""
        if self.others is not None:
            chunk.index_fill_(1, self.others, -torch.inf)
        blocks = (torch.split(ids, UPCAST_ROWS) for ids in self.map.pairs)
        scratch = self._scratch(chunk)
        for columns, ids in zip(*blocks, strict=True):
            logits = self._logits(scratch, ids, start, stop)
            chunk.scatter_(1, columns.expand(len(chunk), -1), logits)

    def rest(
        self, like: Tensor, start: int, stop: int, temperatures: Iterable[float], measured: bool = False
    ) -> dict[str, Tensor]:
        """Largest logit, and log-sums relative to it, of the teacher's tokens without a partner."""
        if not (self.map.has_rest or measured):
            return {}
        scratch = self._scratch(like)
        top = torch.full_like(like, torch.finfo(like.dtype).min)  # finite also where all of them have −inf
        sums = {t: torch.zeros_like(like) for t in dict.fromkeys((*temperatures, *([1.0] if measured else [])))}
        for ids in torch.split(self.map.teacher_rest, UPCAST_ROWS) if self.map.teacher_unmapped else ():
            logits = self._logits(scratch, ids, start, stop)
            higher = torch.maximum(top, logits.amax(1))
            logits.sub_(higher.unsqueeze(1))
            for t, total in sums.items():
                total.mul_(((top - higher) / t).exp()).add_((logits / t).exp_().sum(1))
            top = higher
        found = {OUTSIDE_TOP: top, OUTSIDE_SUM: sums[1.0].log()} if measured else {}
        if self.map.has_rest:
            found |= {REST_TOP: top, **{rest_sum(t): total.log() for t, total in sums.items()}}
        return found

    def _logits(self, scratch: Tensor, ids: Tensor, start: int, stop: int) -> Tensor:
        """Logits of some of the teacher's tokens, written to the first columns of `scratch`."""
        out = scratch[:, : len(ids)]
        self.teacher.fill_columns(out, ids, start, stop)
        return out if self.teacher.transform == (1.0, None) else apply_transform(out, self.teacher.transform, out=out)

    def _scratch(self, like: Tensor) -> Tensor:
        return like.new_empty(len(like), min(UPCAST_ROWS, self.map.teacher_size))
