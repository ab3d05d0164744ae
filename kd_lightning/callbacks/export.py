"""Export of the student as a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_lightning.atomic_io import atomic_folder
from kd_lightning.callbacks.base import PreparedRun, student_of
from kd_lightning.callbacks.checkpoint import checkpoint_folder
from kd_lightning.data.base import tokenizer_of
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.models.hf_adapter import is_peft_model
from kd_lightning.models.lora import save_adapter, save_plain_model
from kd_lightning.reporting.hub import check_repository_name, create_repository, upload
from kd_lightning.training.base import StudentTeacherModule
from kd_lightning.training.learning_rate.monitors import default_monitor

if TYPE_CHECKING:  # importing peft takes a second
    from peft import PeftModel


class HFExport(L.Callback):
    """Export the student to `ROOT/student` in the Hugging Face format: model, tokenizer, generation config.

    It acts in `on_fit_end`, after every checkpoint callback has saved the last step.

    Args:
        which: `last`: the weights at the end; `best`: those with the lowest `monitor` in validation, saved as
            `ROOT/checkpoints/best.ckpt`.
        overwrite: allow a fresh run into a folder that already holds an exported student.
        monitor: the metric that `best` minimizes; None: `val/kd`; `val/ce` with `ce_weight: 1`; `val/forward_kl` if a
            schedule changes what `val/kd` measures (TAID moves its target away from the student).
        push_to_hub: name of a Hugging Face repository, such as `me/student`, to upload the folder to after the run,
            with its model card. A repository that does not exist is created, private, before the first step.

    Raises:
        ValueError: `which` is neither, or `push_to_hub` is no name; before step 0: the folder holds an exported student
            or is not writable, or the hub refuses the repository.

    Examples:
        >>> from kd_lightning.callbacks import HFExport
        >>> export = HFExport(which="best", monitor="val/ce")  # for Trainer(callbacks=[...])
        >>> export.which
        'best'
    """

    def __init__(
        self,
        which: Literal["last", "best"] = "last",
        overwrite: bool = False,
        monitor: str | None = None,
        push_to_hub: str | None = None,
    ) -> None:
        if which not in ("last", "best"):
            raise ValueError(f"export.which must be 'last' or 'best', got {which!r}")
        if push_to_hub is not None:
            check_repository_name(push_to_hub)
        self.push_to_hub = push_to_hub
        self.which = which
        self.overwrite = overwrite
        self.monitor_name = monitor
        self.best: float | None = None
        self._exported = False

    def state_dict(self) -> dict[str, float | None]:
        """The lowest value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Restore the lowest value so far."""
        self.best = state_dict["best"]

    def check(self, root: str | Path, resuming: bool = False) -> None:
        """Check that a run can export into a folder.

        Args:
            root: folder of the run; it need not exist yet.
            resuming: the run continues the one in this folder.

        Raises:
            ValueError: the folder holds an exported student, or is not writable.
        """
        root = Path(root)
        there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        try:
            probe = there / f".writable.{os.getpid()}"  # its own name on each rank
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"trainer.default_root_dir {root} cannot be written to: {error.strerror}") from error
        if (root / "student").exists() and not resuming and not self.overwrite:
            raise ValueError(
                f"{root / 'student'} holds the student of a finished run: choose another --trainer.default_root_dir, "
                "or pass --export.overwrite true to replace it, or --ckpt_path last to resume the run"
            )

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the metric that `best` minimizes."""
        if self.monitor_name is None:
            self.monitor_name = default_monitor(pl_module)
        if stage == "fit":
            self.check_monitor(pl_module)

    def check_monitor(self, module: L.LightningModule) -> None:
        """Check that validation logs the monitor; a custom module may log any name.

        Raises:
            ValueError: validation does not log it.
        """
        if self.which != "best" or self.monitor_name is None or not isinstance(module, StudentTeacherModule):
            return
        known = [f"val/{name}" for name in module.measured]
        custom = not type(module).__module__.startswith("kd_lightning")  # a subclass may log more than it inherits
        if not custom and self.monitor_name not in known:
            raise ValueError(f"export.monitor must be one of {', '.join(known)}, got {self.monitor_name!r}")

    def check_before_start(self, run: PreparedRun) -> None:
        """Check the monitor.

        Raises:
            ValueError: validation does not log it.
        """
        self.check_monitor(run.module)

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Check folder and repository before step 0; the command line checks the folder before models are loaded."""
        if is_fast_dev_run(trainer):
            return
        self.check(trainer.default_root_dir, resuming=trainer.ckpt_path is not None)
        if self.push_to_hub is not None and trainer.is_global_zero:
            create_repository(self.push_to_hub)

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Save the weights if they are the best so far."""
        if self.which != "best" or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(str(self.monitor_name))
        if value is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(
                f"export.monitor must be a metric that validation logs ({known}), got {self.monitor_name!r}"
            )
        if self.best is None or float(value) < self.best:
            self.best = float(value)
            trainer.save_checkpoint(checkpoint_folder(trainer) / "best.ckpt", weights_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Export the student, also if a resumed run had no step left to train."""
        if is_fast_dev_run(trainer):
            return
        if self.which == "best" and self.best is not None:
            checkpoint = trainer.strategy.load_checkpoint(checkpoint_folder(trainer) / "best.ckpt", weights_only=True)
            trainer.strategy.load_model_state_dict(checkpoint)
        elif self.which == "best":
            rank_zero_warn("export.which is 'best', but there was no validation: exporting the last weights")
        student = student_of(pl_module)
        state = full_state_dict(student, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_student(student, tokenizer_of(trainer), Path(trainer.default_root_dir) / "student", state)
        self._exported = True
        trainer.strategy.barrier("export")

    def teardown(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Upload the student, once the callback `Report` has written its model card."""
        folder = Path(trainer.default_root_dir) / "student"
        if stage == "fit" and self.push_to_hub is not None and trainer.is_global_zero and self._exported:
            upload(folder, self.push_to_hub)


def save_student(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Save model, generation config and tokenizer. Atomic: an existing folder is replaced by a complete one.

    Adapters are merged into the weights, and also saved in PEFT's format in a folder `adapter` next to `path`.

    Args:
        student: the model.
        tokenizer: its tokenizer; None: none is saved.
        path: the folder.
        state: the full tensors of a sharded model; None: those of `student`.
    """
    if is_peft_model(student):
        state = student.state_dict() if state is None else state
        with atomic_folder(path.with_name("adapter")) as part:
            save_adapter(cast("PeftModel", student), state, part)
    save_plain_model(student, tokenizer, path, state)
