"""What a run leaves behind: its configuration, its checkpoints, the student as a plain Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from kd_lightning.agreement import check_same, gathered
from kd_lightning.lora import merged_state, save_adapter
from kd_lightning.sharding import whole_state
from kd_lightning.storage import first_free, whole_file, whole_folder


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with its folder at `ROOT/checkpoints`, and `last` always written, also at the end.

    At Ctrl-C (in one process) the step under way is finished and `last` written; the second one waits for nothing.

    Args:
        save_last: also keep the newest state as `last.ckpt`.
        kwargs: `ModelCheckpoint`'s other arguments.
    """

    def __init__(self, save_last: bool | None = True, **kwargs: Any) -> None:
        super().__init__(save_last=save_last, **kwargs)
        self._handler: Any = None
        self._interrupted = False
        self._stepped = 0
        self._open = self._late = False

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder, then Lightning's own set-up."""
        if self.dirpath is None:
            self.dirpath = str(checkpoint_folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl-C; ranks that stop at different steps would wait for each other."""
        super().on_train_start(trainer, pl_module)
        self._interrupted, self._stepped = False, trainer.global_step
        if self.save_last and trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self._unlisten()  # the next one stops at once
        self._interrupted = True
        rank_zero_info("Ctrl-C: this step is finished and last.ckpt written; once more stops at once")

    def _unlisten(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Write what is due; after Ctrl-C write `last` once the optimizer has stepped, and stop."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        stepped, self._stepped = trainer.global_step > self._stepped, trainer.global_step
        self._open = not stepped
        if stepped and self._late:
            self._late = False
            super().on_validation_end(trainer, pl_module)
        if self._interrupted and stepped:
            if not is_dry(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
                rank_zero_info(f"{self.last_model_path} is step {trainer.global_step}: go on with --ckpt_path last")
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write what is due; within an accumulation window only once it has stepped: no file holds its gradients."""
        self._late = self._open and trainer.state.fn == "fit" and not trainer.sanity_checking
        if not self._late:
            super().on_validation_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more."""
        self._unlisten()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._unlisten()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write `last` for the final step where no trigger has."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def checkpoint_folder(trainer: Trainer) -> Path:
    """`ROOT/checkpoints`."""
    return Path(trainer.default_root_dir).absolute() / "checkpoints"


def is_dry(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


class HFExport(Checkpoint):
    """Leave the student under `ROOT/student` as plain Hugging Face: model, tokenizer, generation config.

    It is a `Checkpoint` to Lightning, so that it acts after `last.ckpt` is written.

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
        self._done = False

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
        if not is_dry(trainer):
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

    def on_train_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Export while the models are still on their device."""
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Export where a resumed run had no step left to do."""
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: Any) -> None:
        if self._done or is_dry(trainer):
            return
        self._done = True
        best = checkpoint_folder(trainer) / "best.ckpt"
        if self.which == "best" and self.best is not None:
            state = trainer.strategy.load_checkpoint(best, weights_only=True)
            trainer.strategy.load_model_state_dict(state)
        elif self.which == "best":
            rank_zero_warn("export.which is 'best', and there was no validation to go by: the last weights are kept")
        state = whole_state(pl_module.student, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
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
    if hasattr(model, "get_base_model"):
        state = model.state_dict() if state is None else state
        with whole_folder(path.with_name("adapter")) as part:
            save_adapter(model, state, part)
        model, state = model.get_base_model(), merged_state(model, state)
    with whole_folder(path) as part:
        model.save_pretrained(part, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for file in part.iterdir():
            shutil.copymode(part / "config.json", file)  # safetensors leaves weights to their owner alone


class RunConfig(L.Callback):
    """Write `ROOT/config.yaml`, which repeats the run, once every check before step 0 has passed, and `rows.json`.

    The latter has a line for each split that changes with its rows, so that runs on others are not taken for alike.
    Curves and tables that another run has left there go to `ROOT/earlier-N`, so that they are not read as this one's.

    Args:
        text: the configuration as YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._earlier: list[Path] = []
        self._fresh = False

    def look(self, root: str | Path) -> None:
        """See what another run has left; before a logger writes, and not where a run goes on."""
        root = Path(root)
        there = [root / "results.json", root / "report.md", *root.glob("tensorboard/*")]
        self._earlier = [path for path in there if path.exists()]
        self._fresh = True

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See that every rank was started with the same one."""
        check_same({"configuration": self.text})

    def on_fit_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write the file of a fresh run, which may have to write much else before its first step."""
        if self._fresh:
            self._write(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Write the file of a run that goes on, which nobody has refused now."""
        if not self._fresh:
            self._fresh = True
            self._write(trainer)

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        if is_dry(trainer):
            return
        root = Path(trainer.default_root_dir)
        if self._earlier:
            aside = first_free(lambda n: root / f"earlier-{n}")
            for path in self._earlier:
                target = aside / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
            rank_zero_info(f"{root} holds another run: its curves and tables are in {aside} now")
        with whole_file(root / "config.yaml") as part:
            part.write_text(self.text, encoding="utf-8")
        with whole_file(root / "rows.json") as part:
            part.write_text(json.dumps(rows_of(_datamodule(trainer)), indent=2) + "\n", encoding="utf-8")


class Predictions(L.Callback):
    """Write `ROOT/predictions.jsonl` after `predict`: each test row with its `response`, in file order."""

    def __init__(self) -> None:
        self.responses: dict[int, str] = {}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep this batch's responses as text."""
        texts = _datamodule(trainer).tokenizer.batch_decode(outputs["responses"], skip_special_tokens=True)
        self.responses |= dict(zip(outputs["row_ids"].tolist(), texts, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Gather the ranks' responses and write them."""
        found = gathered(self.responses, trainer.world_size)
        if not trainer.is_global_zero:
            return
        responses = {row_id: text for part in found for row_id, text in part.items()}
        path = Path(trainer.default_root_dir) / "predictions.jsonl"
        with whole_file(path) as part, part.open("w", encoding="utf-8") as lines:
            for row in _datamodule(trainer).generation_rows("test"):
                if row["index"] in responses:
                    fields = {**row["row"], "response": responses[row["index"]].strip()}
                    lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
        rank_zero_info(f"responses written to {path}")


def rows_of(datamodule: Any) -> dict[str, str]:
    """Every loaded split in a line that changes with its rows; training rows only where they are there beforehand."""
    found: dict[str, str] = datamodule.description() if hasattr(datamodule, "description") else {}
    later = hasattr(datamodule, "missing_responses")
    return {name: text for name, text in found.items() if not (later and name == "train rows")}


def _datamodule(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
