"""Label masks: which tokens of a batch have a label."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def next_token_mask(labels: Tensor) -> Tensor:
    """Whether the next token has a label: [B, T − 1] for labels [B, T] that are aligned with their own tokens."""
    return labels[:, 1:] != IGNORE_INDEX


def shift_labels(labels: Tensor) -> Tensor:
    """Labels that stand at their own token, moved to the position that predicts it; the last position has none.

    The losses take labels that are aligned with the logits: position t predicts `labels[..., t]`.

    Args:
        labels: integers [..., T], each at the position of its own token, as data modules and Hugging Face's models have
            them.

    Returns:
        [..., T]; −100 at the last position.

    Examples:
        >>> import torch
        >>> from kd_lightning import shift_labels
        >>> shift_labels(torch.tensor([[-100, -100, 7, 8, 9]]))  # position 1 predicts token 7
        tensor([[-100,    7,    8,    9, -100]])
    """
    return torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], IGNORE_INDEX)), dim=-1)


class LabelMask:
    """The tokens of a batch that have a label.

    Args:
        labels: integers [B, T], or [T] for one response; −100: no label.
        vocabulary: size of the vocabulary.
        name: of the argument, for messages.
        owner: whose vocabulary it is, for messages.

    Attributes:
        shape: of the labels.
        lengths: number of labels of each response, [B].
        index: indices of the N tokens with a label in the flattened batch, [N].
        response: index of the response of each of them, [N].
        labels: their labels, [N].

    Raises:
        ValueError: labels are not integers, or one is outside the vocabulary.
    """

    def __init__(
        self,
        labels: Tensor,
        vocabulary: int,
        name: str = "labels",
        owner: str = "the vocabulary that both models share",
    ) -> None:
        if labels.dtype not in INTEGERS:
            raise ValueError(f"{name} must be integers, got {labels.dtype}")
        self.shape = labels.shape
        table = labels.reshape(labels.shape[:-1].numel(), labels.shape[-1]).long()  # uint8 cannot hold −100
        mask = table != IGNORE_INDEX
        self.lengths = mask.sum(1)
        outside = mask & ((table < 0) | (table >= vocabulary))
        count, wrong = torch.stack((self.lengths.sum(), outside.sum())).tolist()  # the one wait for a GPU
        self.index = torch.nonzero_static(mask.reshape(-1), size=count).squeeze(1)
        self.response = self.index // table.shape[1] if table.shape[1] else self.index
        self.labels = table.reshape(-1).index_select(0, self.index)
        if wrong:
            label = int(table[outside][0])
            raise ValueError(f"{name} must be −100 or in [0, {vocabulary}), {owner}, got {label}")

    def index_in(self, other: Tensor | None) -> Tensor:
        """Indices of the same tokens in the flattened labels of another input, [N]: the k-th of each response.

        Args:
            other: labels [B, T'] with as many labels in each response; None: these labels themselves.

        Raises:
            ValueError: the labels of a response are not as many, or the inputs have not as many responses.
        """
        if other is None:
            return self.index
        if other.dtype not in INTEGERS:
            raise ValueError(f"teacher_labels must be integers, got {other.dtype}")
        if other.ndim != len(self.shape) or other.shape[:-1] != self.shape[:-1]:
            raise ValueError(
                f"teacher_labels must have one row per row of labels, {list(self.shape[:-1])}, got shape "
                f"{list(other.shape)}"
            )
        mask = other.reshape(len(self.lengths), other.shape[-1]).long() != IGNORE_INDEX
        lengths = mask.sum(1)
        for row in torch.nonzero(lengths != self.lengths)[:1].flatten().tolist():  # another wait for a GPU
            raise ValueError(
                f"teacher_labels must have as many labels in each row as labels, got {int(lengths[row])} in row {row}, "
                f"where labels has {int(self.lengths[row])}"
            )
        return torch.nonzero_static(mask.reshape(-1), size=len(self.index)).squeeze(1)

    def column(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of the tokens with a label, [N]; floating-point ones in the given dtype.

        Raises:
            ValueError: there is not one value per token or per response.
        """
        values = values.detach().to(dtype) if values.is_floating_point() else values
        if values.shape == self.shape:
            return values.reshape(-1).index_select(0, self.index)
        if values.shape in (self.shape[:-1], self.lengths.shape):
            return values.reshape(-1).index_select(0, self.response)
        raise ValueError(
            f"rows[{name!r}] must have the labels' shape {list(self.shape)}, or {list(self.lengths.shape)} for one "
            f"value per response, got {list(values.shape)}"
        )

    def response_mean(self, values: Tensor) -> Tensor:
        """Mean over the tokens of each response, repeated for each of its tokens, [N]."""
        sums = values.new_zeros(len(self.lengths)).index_add_(0, self.response, values)
        return (sums / self.lengths)[self.response]
