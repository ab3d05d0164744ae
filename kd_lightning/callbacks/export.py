"""Export of the student as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from kd_lightning.atomic_io import atomic_folder
from kd_lightning.callbacks.checkpoint import checkpoint_folder
from kd_lightning.data.base import tokenizer_of
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.models.hf_adapter import is_peft_model
from kd_lightning.models.lora import merged_state_dict, save_adapter


class HFExport(L.Callback):
    """Leave the student under `ROOT/student` as plain Hugging Face: model, tokenizer, generation config.

    It acts in `on_fit_end`, after every checkpoint callback has saved the last step.

    Args:
        which: `last`: the weights at the end; `best`: those with the lowest `monitor` in validation, kept as
            `ROOT/checkpoints/best.ckpt`.
        overwrite: allow a fresh run into a folder that already holds an exported student.
        monitor: what `best` goes by; None: `val/kd`; `val/ce` where the labels alone are learned (`ce_weight: 1`), and
            `val/forward_kl` where a schedule moves what `val/kd` measures (TAID's target goes away from the student).

    Raises:
        ValueError: before step 0, where the folder is taken or cannot be written to, or `which` is neither.
    """

    def __init__(
        self, which: Literal["last", "best"] = "last", overwrite: bool = False, monitor: str | None = None
    ) -> None:
        if which not in ("last", "best"):
            raise ValueError(f"export.which must be 'last' or 'best', got {which!r}")
        self.which = which
        self.overwrite = overwrite
        self.monitor_name = monitor
        self.best: float | None = None
        self.resuming = False

    def state_dict(self) -> dict[str, Any]:
        """The lowest value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the lowest value back; a run that has a state to take back goes on in its own folder."""
        self.best = state_dict["best"]
        self.resuming = True

    def check(self, root: str | Path) -> None:
        """Refuse a folder that holds a finished run or that cannot be written to."""
        root = Path(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".writable.{os.getpid()}"  # every rank looks
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"trainer.default_root_dir {root} cannot be written to: {error.strerror}") from error
        if (root / "student").exists() and not self.resuming and not self.overwrite:
            raise ValueError(
                f"{root / 'student'} holds the student of a finished run: choose another --trainer.default_root_dir, "
                "or --export.overwrite true to replace it, or --ckpt_path last to go on with it"
            )

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle what `best` goes by."""
        if self.monitor_name is None:
            self.monitor_name = "val/ce" if getattr(pl_module, "labels_only", False) else "val/kd"
            if getattr(pl_module, "objective_moves", False) and "forward_kl" in getattr(pl_module, "monitors", ()):
                self.monitor_name = "val/forward_kl"
        if stage == "fit":
            self.check_monitor(pl_module)

    def check_monitor(self, module: Any) -> None:
        """Refuse a monitor that validation does not log (a module of the user's own may log anything)."""
        known = [f"val/{name}" for name in getattr(module, "measured", ())]
        ours = type(module).__module__.startswith("kd_lightning")
        if self.which == "best" and ours and self.monitor_name not in (None, *known):
            raise ValueError(f"export.monitor must be one of {', '.join(known)}, got {self.monitor_name!r}")

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Check the folder before step 0 (the command line has done so earlier still)."""
        if not is_fast_dev_run(trainer):
            self.check(trainer.default_root_dir)

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights where they are the best so far."""
        if self.which != "best" or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(str(self.monitor_name))
        if value is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"export.monitor {self.monitor_name!r} is not measured in validation; there are {known}")
        if self.best is None or float(value) < self.best:
            self.best = float(value)
            trainer.save_checkpoint(checkpoint_folder(trainer) / "best.ckpt", weights_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Export the student, also if a resumed run had no step left to train."""
        if not is_fast_dev_run(trainer):
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: Any) -> None:
        best = checkpoint_folder(trainer) / "best.ckpt"
        if self.which == "best" and self.best is not None:
            state = trainer.strategy.load_checkpoint(best, weights_only=True)
            trainer.strategy.load_model_state_dict(state)
        elif self.which == "best":
            rank_zero_warn("export.which is 'best', and there was no validation to go by: the last weights are kept")
        state = full_state_dict(pl_module.student, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            tokenizer = tokenizer_of(trainer)
            save_student(pl_module.student, tokenizer, Path(trainer.default_root_dir) / "student", state)
        trainer.strategy.barrier("export")


def save_student(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write model, generation config and tokenizer; what lay at `path` stays whole until the new folder is.

    Of a student with adapters, the model has them in its weights; as PEFT keeps them they lie in `adapter` beside it.

    Args:
        student: the model.
        tokenizer: its tokenizer; None: none is written.
        path: the folder.
        state: the model's tensors, where it does not hold them whole itself.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one file: a bar of one step
    model: Any = student
    if is_peft_model(model):
        state = model.state_dict() if state is None else state
        with atomic_folder(path.with_name("adapter")) as part:
            save_adapter(model, state, part)
        model, state = model.get_base_model(), merged_state_dict(model, state)
    with atomic_folder(path) as part:
        model.save_pretrained(part, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for file in part.iterdir():
            shutil.copymode(part / "config.json", file)  # safetensors leaves weights to their owner alone
