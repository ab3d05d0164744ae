"""Class paths in the `config.yaml` of earlier versions: where each class that moved is today."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

# Old full path -> the path that a run saves today. Classes that were always reachable under an unchanged path are not
# listed. Applied wherever a config is read: by the program to files and to the command line, by `compare` to runs.
MOVED_CLASSES = {
    "kd_lightning.baselines.Baselines": "kd_lightning.callbacks.Baselines",
    "kd_lightning.cached_teacher.CachedTeacher": "kd_lightning.CachedTeacher",
    "kd_lightning.components.PartialKL": "kd_lightning.training.loss_components.PartialKL",
    "kd_lightning.dashboard.Dashboard": "kd_lightning.callbacks.Dashboard",
    "kd_lightning.data.batch.Collator": "kd_lightning.data.Collator",
    "kd_lightning.data.batch.PromptCollator": "kd_lightning.data.PromptCollator",
    "kd_lightning.data.prompted.PromptDataModule": "kd_lightning.PromptDataModule",
    "kd_lightning.generation.Sampling": "kd_lightning.models.generate.Sampling",
    "kd_lightning.generation_quality.GenerationQuality": "kd_lightning.callbacks.GenerationQuality",
    "kd_lightning.lora.LoRA": "kd_lightning.LoRA",
    "kd_lightning.metric_buckets.ByPosition": "kd_lightning.ByPosition",
    "kd_lightning.metric_buckets.BySource": "kd_lightning.BySource",
    "kd_lightning.minillm.MiniLLM": "kd_lightning.MiniLLM",
    "kd_lightning.progress.PlainProgress": "kd_lightning.callbacks.progress.PlainProgress",
    "kd_lightning.progress.StepBar": "kd_lightning.callbacks.progress.StepBar",
    "kd_lightning.regeneration.Regeneration": "kd_lightning.Regeneration",
    "kd_lightning.replay.AdaptiveReplay": "kd_lightning.AdaptiveReplay",
    "kd_lightning.report.Report": "kd_lightning.callbacks.Report",
    "kd_lightning.responses.ResponseSource": "kd_lightning.ResponseSource",
    "kd_lightning.results.ResultsTable": "kd_lightning.callbacks.ResultsTable",
    "kd_lightning.samples.Samples": "kd_lightning.callbacks.Samples",
    "kd_lightning.storage.WholeCheckpointIO": "kd_lightning.distributed.checkpoint_io.AtomicCheckpointIO",
    "kd_lightning.teacher_base.Teacher": "kd_lightning.Teacher",
}


# PyTorch's schedulers, by path or by name -> ours, whose lengths can follow the run.
SCHEDULERS = "kd_lightning.training.learning_rate.schedulers."
WITH_LENGTH: tuple[str, ...] = (
    "PolynomialLR",
    "LinearLR",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "StepLR",
)
WITH_LENGTH += ("MultiStepLR", "CyclicLR", "OneCycleLR", "ReduceLROnPlateau")
REPLACED = {f"{path}{name}": SCHEDULERS + name for name in WITH_LENGTH for path in ("", "torch.optim.lr_scheduler.")}
REPLACED |= {"lightning.pytorch.cli.ReduceLROnPlateau": f"{SCHEDULERS}ReduceLROnPlateau"}
REPLACED |= {"WarmupLR": f"{SCHEDULERS}WarmupLR"}

# Functions of transformers that build a scheduler -> the schedule's name in `transformers.get_scheduler`.
WARMUP_FUNCTIONS = {
    "get_linear_schedule_with_warmup": "linear",
    "get_cosine_schedule_with_warmup": "cosine",
    "get_cosine_with_hard_restarts_schedule_with_warmup": "cosine_with_restarts",
    "get_polynomial_decay_schedule_with_warmup": "polynomial",
    "get_constant_schedule": "constant",
    "get_constant_schedule_with_warmup": "constant_with_warmup",
    "get_inverse_sqrt_schedule": "inverse_sqrt",
    "get_cosine_with_min_lr_schedule_with_warmup": "cosine_with_min_lr",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": "cosine_warmup_with_min_lr",
    "get_wsd_schedule": "warmup_stable_decay",
}


def update_class_paths(config: T) -> T:
    """A copy of a config, or of a part of it, in which every class that moved or is replaced has its present path."""
    updated: object = config
    if isinstance(config, str):
        updated = MOVED_CLASSES.get(config) or REPLACED.get(config) or config
    elif isinstance(config, dict):
        updated = {
            name: update_class_paths(named_schedule(value) if name == "lr_scheduler" else value)
            for name, value in _warmup(config).items()
        }
    elif isinstance(config, list):
        updated = [update_class_paths(value) for value in config]
    return updated  # type: ignore[return-value]


def named_schedule(value: object) -> object:
    """A scheduler by a name of `transformers.get_scheduler`, or by the path of its function, as a class with arguments.

    Args:
        value: of `lr_scheduler`; anything else than such a name or path is returned unchanged.
    """
    if value in ("reduce_lr_on_plateau", "plateau"):
        return {"class_path": f"{SCHEDULERS}ReduceLROnPlateau"}
    if isinstance(value, str) and value in WARMUP_FUNCTIONS.values():
        return {"class_path": f"{SCHEDULERS}WarmupLR", "init_args": {"name": value}}
    return _warmup({"class_path": value}) if isinstance(value, str) and _function(value) else value


def _function(path: object) -> str:
    """Name of the schedule that a function of transformers builds; empty for any other path."""
    if not isinstance(path, str) or not path.startswith(("transformers.", "get_")):
        return ""
    return WARMUP_FUNCTIONS.get(path.rpartition(".")[2], "")


def _warmup(config: dict[str, Any]) -> dict[str, Any]:
    """A class with arguments; one that is a function of transformers becomes `WarmupLR` of its name."""
    name = _function(config.get("class_path"))
    if not name:
        return config
    given = dict(config.get("init_args") or {})
    steps = {key: given.pop(key) for key in ("num_warmup_steps", "num_training_steps") if key in given}
    extra = {"scheduler_specific_kwargs": given} if given else {}
    return {"class_path": f"{SCHEDULERS}WarmupLR", "init_args": {"name": name, **steps, **extra}}
