"""One answer in the tokens of two tokenizers, with the boundaries that they share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS, TEACHER_POSITIONS
from kd_lightning.data.alignment.two_tokenizers import TwoTokenizers

SHOWN = 24  # tokens of an answer
SHARED, OWN = " | ", " · "


def shown_boundaries(batch: Mapping[str, Tensor], data: TwoTokenizers) -> str | None:
    """The answer of the first row with a label, as both models read it; None if there is no such row.

    Args:
        batch: of the data.
        data: with two tokenizers.
    """
    labeled = batch["labels"] != IGNORE_INDEX
    for row, there in enumerate(labeled):
        places = there.nonzero().flatten().tolist()[:SHOWN]
        if not places:
            continue
        read = batch[TEACHER_POSITIONS][row].tolist()
        shared = {read[place] for place in places if read[place] >= 0}
        if not shared:
            continue
        ids, own = batch["input_ids"][row].tolist(), batch[TEACHER_FIELDS["input_ids"]][row].tolist()
        student = _line(data.tokenizer, [(ids[place], read[place] >= 0) for place in places])
        last = max(shared)
        teacher = _line(data.teacher_tokenizer, [(own[n], n in shared) for n in range(min(shared), last + 1)])
        return f"an answer in both tokenizers, | where both have read the same text: student{student}; teacher{teacher}"
    return None


def _line(tokenizer: PreTrainedTokenizerBase, tokens: list[tuple[int, bool]]) -> str:
    return "".join((SHARED if shared else OWN) + repr(tokenizer.decode([token]))[1:-1] for token, shared in tokens)
