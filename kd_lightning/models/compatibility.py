"""Checks that a model can read the rows: its embeddings have every token, its positions reach the longest row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from kd_lightning.models.hf_adapter import base_model, input_embeddings, max_positions, num_embeddings


class LoadedRows(Protocol):
    """What is compared with a model: rows that are loaded."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer of the rows."""

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's."""

    def longest(self, role: str = "student") -> int:
        """Number of tokens of the longest row."""

    def largest_id(self, role: str = "student") -> int:
        """The largest token id in the rows, as a role reads them."""


class RowsOfTeachers(LoadedRows, Protocol):
    """A data module with loaded rows, which several teachers may read otherwise."""

    def for_member(self, name: str) -> LoadedRows:
        """The rows as one of several teachers reads them."""


def check_models_fit_data(
    models: Iterable[tuple[str, nn.Module, str]], datamodule: RowsOfTeachers | None
) -> Iterator[str]:
    """Check that all models can read every loaded row, and yield warnings.

    Args:
        models: role (`student`, `teacher`, or `teacher NAME`), Hugging Face causal LM, and the teacher's name or "".
        datamodule: a data module with loaded rows; None: the rows are not checked.

    Raises:
        ValueError: a token has no embedding, or a row is longer than the position embeddings.
    """
    if datamodule is None:
        return
    for role, model, member in models:
        yield from _check(role, model, datamodule.for_member(member) if member else datamodule)


def _check(role: str, model: nn.Module, datamodule: LoadedRows) -> Iterator[str]:
    embeddings = input_embeddings(model)
    known, side = num_embeddings(embeddings), role.split()[0]
    tokenizer = datamodule.teacher_tokenizer if side == "teacher" else datamodule.tokenizer
    if known is not None and len(tokenizer) > known and (largest := datamodule.largest_id(side)) >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"token {largest} ({token!r}) of the data is outside of the {role}'s {known} embeddings: call "
            "resize_token_embeddings on the model, or do not add tokens to the tokenizer"
        )
    positions, longest = max_positions(base_model(model)), datamodule.longest(side)
    if positions is None or longest <= positions:
        return
    text = f"a row has {longest} tokens and the {role} max_position_embeddings of {positions}: lower data.max_length"
    learned = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not embeddings)
    if any(positions <= part.num_embeddings <= positions + 2 for part in learned):
        raise ValueError(text)
    yield text
