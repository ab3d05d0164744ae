"""What a run leaves behind: checkpoints, the student as a plain Hugging Face folder, the closing table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_lightning.storage import whole_file, whole_folder


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with its folder at `ROOT/checkpoints`, and `last` always written, also at the end.

    Args:
        kwargs: `ModelCheckpoint`'s own arguments.
    """

    def __init__(self, save_last: bool | None = True, **kwargs: Any) -> None:
        super().__init__(save_last=save_last, **kwargs)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder, then Lightning's own set-up."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `last` for the final step where no trigger has."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class HFExport(L.Callback):
    """Leave the student under `ROOT/student` as plain Hugging Face: model, tokenizer, generation config.

    Args:
        which: `last`: the weights at the end; `best`: those of the checkpoint with the best monitored value (needs
            `checkpoint.monitor`).
        overwrite: allow a fresh run into a folder that already holds an exported student.

    Raises:
        ValueError: before step 0, where the folder is taken, cannot be written to, or `best` has nothing to go by.
    """

    def __init__(self, which: Literal["last", "best"] = "last", overwrite: bool = False) -> None:
        self.which = which
        self.overwrite = overwrite
        self._done = False

    def check(self, root: str | Path, resuming: bool) -> None:
        """Refuse a folder that holds a finished run or that cannot be written to."""
        root = Path(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"trainer.default_root_dir {root} cannot be written to: {error.strerror}") from error
        if (root / "student").exists() and not resuming and not self.overwrite:
            raise ValueError(
                f"{root / 'student'} holds the student of a finished run: choose another --trainer.default_root_dir, "
                "or --export.overwrite true to replace it, or --ckpt_path last to go on with it"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask everything that can be asked before step 0."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        resuming = trainer._checkpoint_connector._user_managed or trainer.ckpt_path is not None
        self.check(trainer.default_root_dir, resuming)
        if self.which == "best" and not any(getattr(c, "monitor", None) for c in trainer.checkpoint_callbacks):
            raise ValueError("export.which 'best' needs a value to go by: set --checkpoint.monitor, for example val/kd")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export while the models are still on their device."""
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export where a resumed run had no step left to do."""
        self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._done or trainer.fast_dev_run:
            return
        self._done = True
        if self.which == "best":
            load_best(trainer, pl_module)
        if trainer.is_global_zero:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            save_student(pl_module.student, tokenizer, Path(trainer.default_root_dir) / "student")
        trainer.strategy.barrier("export")


def load_best(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Put the weights of the best checkpoint into the module."""
    path = next((c.best_model_path for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), "")
    if path:
        module.load_state_dict(trainer.strategy.load_checkpoint(path, weights_only=True)["state_dict"])


def save_student(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> None:
    """Write model, generation config and tokenizer; what lay at `path` stays whole until the new folder is."""
    with whole_folder(path) as part:
        student.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


class RunConfig(L.Callback):
    """Write `ROOT/config.yaml`, which repeats the run, once every check before step 0 has passed.

    Args:
        text: the configuration as YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        if not trainer.fast_dev_run:
            with whole_file(Path(trainer.default_root_dir) / "config.yaml") as part:
                part.write_text(self.text, encoding="utf-8")
