"""What the callbacks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L


@contextmanager
def on_training_device(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Put the module back on the device it was trained on, for work in `on_fit_end`.

    Lightning tears its strategy down between `on_train_end` and `on_fit_end`; most strategies move the module to the
    CPU there. Process groups stay open, so collectives still work.
    """
    left = module.device
    moved = left != trainer.strategy.root_device
    if moved:
        trainer.strategy.model_to_device()
    try:
        yield
    finally:
        if moved:
            module.to(left)
