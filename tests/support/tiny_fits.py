"""Short fits of tiny models on given batches, in Python."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule

Batch = dict[str, Tensor]


SGD = functools.partial(torch.optim.SGD, lr=1.0)


STILL = functools.partial(torch.optim.SGD, lr=0.0)


def rows(count: int = 12, vocabulary: int = 2048, length: int = 14) -> Batch:
    """Responses of 1 to 9 tokens behind prompts of 2, padded to one length."""
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (count, length), generator=numbers)
    ends = 3 + torch.randint(0, 9, (count, 1), generator=numbers)
    place = torch.arange(length)
    mask = (place < ends).long()
    labels = ids.masked_fill((place < 2) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "row_ids": torch.arange(count)}


def split(batch: Batch, *sizes: int) -> list[Batch]:
    """Consecutive batches of these sizes."""
    columns = [column.split(sizes) for column in batch.values()]
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*columns, strict=True)]


class Run(DistillationModule):
    """Keeps what is logged after each micro-batch."""

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.logged = [*getattr(self, "logged", []), {k: float(v) for k, v in self.trainer.callback_metrics.items()}]


def fit(module: DistillationModule, batches: list[Batch], validation: list[Batch] | None = None, **kwargs: Any) -> Any:
    """Train one epoch; the module."""
    settings: dict[str, Any] = {"max_epochs": 1, "devices": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=len(validation or []),
        use_distributed_sampler=False,
        **{**settings, **kwargs},
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(validation or batches, batch_size=None))
    return module


def fit_data(
    module: DistillationModule, data: L.LightningDataModule, steps: int, seed: int, **settings: Any
) -> dict[str, Tensor]:
    """Train some steps on a data module, without validation and files; the student's weights."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **{"devices": 1, **settings},
    )
    trainer.fit(module, datamodule=data)
    return weights(module)


def bundled(**kwargs: Any) -> Run:
    """The bundled pair, half label loss."""
    return Run(**{"student": "asset:student", "teacher": "asset:teacher", "ce_weight": 0.5, "optimizer": SGD, **kwargs})


def weights(module: DistillationModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.student.named_parameters()}


def assert_same_student(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=f"{name} differs")


# --------------------------------------------------------------------------------------------------------------- ranks
def of_rank(batch: Batch, rank: int) -> list[Batch]:
    """Two steps of two micro-batches: 5 rows against 3, then 4 against rows of which nothing is counted."""
    a, b, c, d, e, f = split(batch, 3, 2, 1, 2, 2, 2)
    none = {**e, "labels": torch.full_like(e["labels"], -100)}
    return [a, b, e, f] if rank == 0 else [c, d, none, none]
