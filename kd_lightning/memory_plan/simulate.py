"""Plan the memory of one training step without weights, GPUs or other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch.distributed as dist
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from kd_lightning.data.alignment.two_tokenizers import TeacherTokenizers
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.memory_plan.figures import Plan
from kd_lightning.memory_plan.step_simulation import StepSimulation
from kd_lightning.models.loading import has_tokenizer_files
from kd_lightning.module import DistillationModule
from kd_lightning.training.teacher_setup import use_two_tokenizers


@contextmanager
def fake_process_group(count: int) -> Iterator[None]:
    """Within the context, this process is rank 0 of `count` ranks; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if count > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        if count > 1:
            dist.destroy_process_group()


def plan(module: DistillationModule, datamodule: L.LightningDataModule, trainer: L.Trainer, gpu: bool) -> Plan:
    """Plan one step of a run that has not started; the module must not be used afterwards.

    Args:
        module: with names of models; not loaded.
        datamodule: gives `batch_size`, `max_length` and the tokenizers; no data is read.
        trainer: of as many CPU devices as there are ranks.
        gpu: whether the plan is for GPUs: their tile size, and offloaded tensors in host memory.

    Raises:
        ValueError: a model has no configuration, or its computation depends on values; the strategy is not supported;
            a tokenizer cannot be read, or the loss cannot be computed between two vocabularies.
    """
    ranks, kind = trainer.num_devices, type(trainer.strategy).__name__
    if kind not in ("FSDP2Strategy", "DDPStrategy", "SingleDeviceStrategy"):
        raise ValueError(f"plan: the strategy must be a single device, ddp or fsdp2, got {kind}")
    found = Plan(
        ranks, {"FSDP2Strategy": "fsdp2", "DDPStrategy": "ddp"}.get(kind, "one device"), _batch_shape(datamodule)
    )
    own_input, known = False, None
    if isinstance(datamodule, DistillationDataModule):
        found.notes += load_tokenizers(module, datamodule)
        own_input, known = datamodule.teacher_has_own_input, datamodule.vocabulary_map
        if datamodule.packing:
            module.model.pack_rows(check=False)
    with fake_process_group(ranks):
        try:
            StepSimulation(module, trainer, found, gpu, own_input, known).run()
        except DynamicOutputShapeException:
            raise ValueError(
                "plan: the computation of one of the models depends on values (such as the routing of tokens to "
                "experts), and a plan has shapes only: it cannot be planned"
            ) from None
        except RuntimeError as error:
            if "Expected inputs of BF16" not in str(error):
                raise
            raise ValueError(
                "plan: mixtures of experts must be in bfloat16: pass --trainer.precision bf16-true for a student, "
                "--model.teacher_kwargs.dtype bfloat16 for a teacher"
            ) from None
    return found


def load_tokenizers(module: DistillationModule, data: DistillationDataModule) -> list[str]:
    """Load the tokenizers of student and teacher, without any rows; if they are two, the module uses both.

    Args:
        module: with names of models; not loaded.
        data: not set up.

    Returns:
        A note if they are not compared, because a folder has a configuration and no tokenizer.

    Raises:
        ValueError: a tokenizer cannot be read, or the loss cannot be computed between two vocabularies.
    """
    teacher = module.teacher
    if teacher is None:
        return []
    own = module.teacher_tokenizer_name
    several = own if isinstance(own, TeacherTokenizers) else None
    names = {"student": module.tokenizer_name}
    if isinstance(own, TeacherTokenizers):
        names |= {f"teacher {name!r}": path for name, path in own.names.items()}
    else:
        names["teacher"] = own
    without = [role for role, name in names.items() if name is not None and not has_tokenizer_files(name)]
    data.use_tokenizer_of(None if "student" in without else names["student"])
    data.use_teacher_tokenizer_of(own)
    if data.load_tokenizers() and "student" in without:
        without.remove("student")  # the data module was given a tokenizer
    if data.has_two_tokenizers and several is not None:
        raise ValueError(
            f"plan: the teachers {', '.join(several.names)} have several tokenizers, and a plan has one of them: plan "
            "with each as the only teacher"
        )
    if data.has_two_tokenizers:
        use_two_tokenizers(data, teacher, module.model, module.reporter)
        return []
    found, models = " and ".join(without), "both models" if several is None else "all models"
    return [f"no tokenizer files for {found}: {models} are assumed to read the same tokens"] if found else []


def _batch_shape(datamodule: Any) -> tuple[int, int]:
    if isinstance(datamodule, DistillationDataModule):
        return datamodule.rows_per_batch, datamodule.max_length
    try:
        rows, length = int(datamodule.batch_size), int(datamodule.max_length)
    except AttributeError:
        raise ValueError(
            f"plan: the data module needs batch_size and max_length, and {type(datamodule).__name__} lacks one"
        ) from None
    return rows, length
