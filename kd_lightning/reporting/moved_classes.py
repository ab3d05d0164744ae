"""Class paths in the `config.yaml` of earlier versions: where each class that moved is today."""

from __future__ import annotations

from typing import TypeVar

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


def update_class_paths(config: T) -> T:
    """A copy of a config, or of a part of it, in which every class that moved has its present path."""
    updated: object = config
    if isinstance(config, str):
        updated = MOVED_CLASSES.get(config, config)
    elif isinstance(config, dict):
        updated = {name: update_class_paths(value) for name, value in config.items()}
    elif isinstance(config, list):
        updated = [update_class_paths(value) for value in config]
    return updated  # type: ignore[return-value]
