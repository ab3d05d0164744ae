"""Rows without padding: where the tokens of a batch are in packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PackedLayout:
    """The tokens of a padded batch [B, T] in sequences [S, L] that hold several rows each, one after the other.

    Positions restart with each row, by which the attention of transformers keeps rows apart if there is no attention
    mask. What is left over at the end of a sequence is padding with positions of its own.

    A sequence is as long as the longest row, so that attention with a mask, whose cost grows with the square of the
    length, never costs more than in the padded batch. Attention without one reads a single sequence.

    Args:
        attention_mask: 1 for tokens, 0 for padding, [B, T].
        one_sequence: whether all rows are in one sequence.

    Attributes:
        position_ids: [S, L].
    """

    def __init__(self, attention_mask: Tensor, one_sequence: bool = False) -> None:
        mask = attention_mask.bool()
        self.batch_shape = mask.shape
        lengths: list[int] = mask.sum(1).tolist()  # the one wait for a GPU
        width = sum(lengths) if one_sequence else max(lengths)
        starts, used = place_rows(lengths, width)
        positions = (mask.cumsum(1) - 1).reshape(-1)
        first = torch.tensor(starts, device=mask.device).repeat_interleave(mask.shape[1], output_size=mask.numel())
        self.source = torch.nonzero_static(mask.reshape(-1), size=sum(lengths)).squeeze(1)
        self.target = (first + positions).index_select(0, self.source)
        ends = torch.tensor(used, device=mask.device).unsqueeze(1)
        ids = (torch.arange(width, device=mask.device) - ends).clamp_min(0)
        ids.view(-1).index_copy_(0, self.target, positions.index_select(0, self.source))
        self.position_ids = ids

    @property
    def is_empty(self) -> bool:
        """Whether there are no tokens, and so no sequence that a model could read."""
        return self.position_ids.numel() == 0

    def pack(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] as [S, L]; 0 is the token id of padding."""
        packed = input_ids.new_zeros(self.position_ids.numel())
        return packed.index_copy_(0, self.target, input_ids.reshape(-1)[self.source]).view_as(self.position_ids)

    def unpack(self, outputs: Tensor) -> Tensor:
        """Outputs [S, L, H] as [B, T, H]; zeros at padding."""
        tokens = outputs.flatten(0, 1).index_select(0, self.target)
        rows = outputs.new_zeros(self.batch_shape.numel(), outputs.shape[-1]).index_copy_(0, self.source, tokens)
        return rows.view(*self.batch_shape, -1)


def place_rows(lengths: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Put rows into as few sequences as first-fit-decreasing needs.

    Args:
        lengths: tokens of each row, at most `width`.
        width: tokens of a sequence.

    Returns:
        The position of each row's first token in the flattened sequences, and the number of tokens of each sequence.
    """
    starts, used = [0] * len(lengths), [0]
    for row in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        sequence = next((n for n, tokens in enumerate(used) if tokens + lengths[row] <= width), len(used))
        if sequence == len(used):
            used.append(0)
        starts[row] = sequence * width + used[sequence]
        used[sequence] += lengths[row]
    return starts, used
