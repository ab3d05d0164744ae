"""Whether rows fit into a model: ids that it embeds, places that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from kd_lightning.models.hf_adapter import input_embeddings, max_positions, num_embeddings


class LoadedRows(Protocol):
    """What is compared with a model: a data module whose rows are loaded."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the rows."""

    def longest(self) -> int:
        """Number of tokens of the longest row."""

    def largest_id(self) -> int:
        """The largest token id in the rows."""


def check_model_fits_data(
    student: nn.Module, teacher: nn.Module | None, datamodule: LoadedRows | None
) -> Iterator[str]:
    """See that both models can read every row that is loaded; what is doubtful is yielded.

    Args:
        student: a Hugging Face causal LM.
        teacher: the teacher's model; None: there is none in this process.
        datamodule: a data module with its rows loaded; None: nothing is known of the rows.

    Raises:
        ValueError: a token has no embedding, or a row is longer than the position embeddings.
    """
    if datamodule is None:
        return
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            yield from _check(role, model, datamodule)


def _check(role: str, model: Any, datamodule: LoadedRows) -> Iterator[str]:
    embeddings = input_embeddings(model)
    known = num_embeddings(embeddings)
    if known is not None and len(datamodule.tokenizer) > known and (largest := datamodule.largest_id()) >= known:
        token = datamodule.tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"token {largest} ({token!r}) of the rows has no place in the {role}'s {known} embeddings: "
            "resize_token_embeddings gives it one, or leave out the tokens that were added"
        )
    places, longest = max_positions(model), datamodule.longest()
    if places is None or longest <= places:
        return
    text = f"a row has {longest} tokens and the {role} max_position_embeddings of {places}: lower data.max_length"
    learned = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not embeddings)
    if any(places <= part.num_embeddings <= places + 2 for part in learned):
        raise ValueError(text)
    yield text
