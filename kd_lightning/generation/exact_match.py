"""Exact match of greedy responses with the reference answers, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import lightning.pytorch as L
import torch
from transformers import PreTrainedModel

from kd_lightning.console import progress_bar, progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, GenerationRow
from kd_lightning.data.collate import left_pad
from kd_lightning.data.tokenization import masked_id
from kd_lightning.distributed.trainer import data_parallel_rank, forward_context
from kd_lightning.models.generate import Sampling, generate


def greedy_responses(
    trainer: L.Trainer,
    datamodule: DistillationDataModule,
    model: PreTrainedModel,
    rows: Sequence[GenerationRow],
    max_new_tokens: int,
    batch_size: int,
    name: str,
    role: str = "student",
    whole: bool = False,
) -> dict[int, str]:
    """Greedy responses to this rank's share of some rows, by their `index`.

    They are generated in the precision of the run. A batch stops one token after its longest answer: a longer response
    matches none of them.

    Args:
        trainer: the Trainer of the run.
        datamodule: the data module that the rows come from.
        model: the model that generates, on its device.
        rows: the rows of all ranks, at least one.
        max_new_tokens: longest response.
        batch_size: prompts per batch.
        name: name of the model, for the progress bar.
        role: of the model, "student" or "teacher", which may have a tokenizer of its own.
        whole: responses go on to their end, or to `max_new_tokens`.
    """
    rank, ranks = data_parallel_rank(trainer)
    own_rows = sorted(rows[rank::ranks], key=lambda row: len(row["prompt_ids"]))
    tokenizer, device = datamodule.tokenizer_of(role), model.device
    responses: dict[int, str] = {}
    starts = range(0, -(-len(rows) // ranks), batch_size)
    for start in progress_bar(starts, f"{name} answers", shown=progress_bar_enabled(trainer)):
        own = own_rows[start : start + batch_size]
        batch = own or rows[:1]  # every rank runs a sharded model equally often
        inputs = left_pad([row["prompt_ids"] for row in batch], masked_id(tokenizer))
        longest = max(len(ids) for ids in tokenizer([row["answer"] for row in batch])["input_ids"]) + 1
        sampling = Sampling(max_new_tokens if whole else min(max_new_tokens, longest), temperature=0.0)
        with forward_context(trainer):
            tokens = generate(model, inputs["input_ids"].to(device), inputs["attention_mask"].to(device), sampling)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        responses |= {row["index"]: text.strip() for row, text in zip(own, texts, strict=False)}
    return responses


def exact_match(trainer: L.Trainer, rows: Sequence[GenerationRow], responses: Mapping[int, str]) -> float:
    """Share of rows, over all ranks, whose response equals the reference answer.

    Args:
        trainer: the Trainer of the run; every rank calls this.
        rows: the rows of all ranks.
        responses: this rank's responses by `index`.
    """
    return mean_score(trainer, rows, responses, lambda response, row: float(response == row["answer"].strip()))


def mean_score(
    trainer: L.Trainer,
    rows: Sequence[GenerationRow],
    responses: Mapping[int, str],
    score: Callable[[str, GenerationRow], float],
) -> float:
    """Mean score of the responses to rows, over all ranks.

    Args:
        trainer: the Trainer of the run; every rank calls this.
        rows: the rows of all ranks.
        responses: this rank's responses by `index`.
        score: of a response to a row.
    """
    own = [row for row in rows if row["index"] in responses]
    total = torch.tensor(
        math.fsum(score(responses[row["index"]], row) for row in own), device=trainer.strategy.root_device
    )
    if trainer.world_size > 1:  # with tensor parallelism, several processes count the same rows
        share = data_parallel_rank(trainer)[1] / trainer.world_size
        total = trainer.strategy.reduce(total, reduce_op="sum") * share
    return float(total) / len(rows)
