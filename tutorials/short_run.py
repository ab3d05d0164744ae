"""What the notebooks share: the style of figures, quiet output, and a short run of Lightning's `Trainer`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import lightning as L
import matplotlib.pyplot as plt
from transformers.utils import logging as transformers_logging

NOT_HERE = (  # advice for long runs, by its wording
    "does not have many workers",  # the data is small
    "The number of training batches",  # logging every 50 steps in a run of fewer
    "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning 2.6 asks torch's pytree in the old way
)
STYLE = {
    "figure.figsize": (6.4, 3),
    "figure.dpi": 120,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
}


def quiet() -> None:
    """Set the style of figures; turn off progress bars, log lines below errors, and the warnings named above."""
    plt.rcParams.update(STYLE)
    for message in NOT_HERE:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


def short_trainer(steps: int, callbacks: Sequence[L.Callback] = (), **settings: Any) -> L.Trainer:
    """A `Trainer` on the CPU for a number of steps, which writes no files; `settings` are the `Trainer`'s own."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"gradient_clip_val": 1.0, "enable_checkpointing": False, **silent}
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,  # no limit: `max_steps` decides
        callbacks=list(callbacks),
        **{**defaults, **settings},
    )


def short_run(
    module: L.LightningModule,
    data: L.LightningDataModule,
    steps: int,
    seed: int = 0,
    callbacks: Sequence[L.Callback] = (),
    **settings: Any,
) -> L.LightningModule:
    """Train a module and return it. The seed decides the order of the rows."""
    L.seed_everything(seed, verbose=False)
    short_trainer(steps, callbacks, **settings).fit(module, datamodule=data)
    return module
