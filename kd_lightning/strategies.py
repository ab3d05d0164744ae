"""FSDP2 for two models: the student and its loss under one root, the teacher beside them, layer by layer."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy

from kd_lightning.sharding import checkpoint_activations, shard_student, shard_teacher

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state of the student spread over ranks; the teacher's parameters too.

    Every rank reads its own rows. Layers are gathered one at a time, in the precision they compute in; what stands
    around them (embedding, last norm, head) is gathered as it is, so that the loss reads what it reads on one device.

    Args:
        shard_size: ranks that share one copy of the models, a divisor of their number; None: all of them. Fewer: a copy
            in every group, gradients averaged between groups (hybrid shard).
        activation_checkpointing: compute the student's layers again in backward instead of keeping what they computed.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        process_group_backend: of `torch.distributed`; None: by the device.
        timeout: of one collective.

    Raises:
        ValueError: a size does not divide the number of ranks; the trainer's precision is none that it can do.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self.shard_size = shard_size
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload

    # ----------------------------------------------------------------------------------------------------------- ranks
    def _configure_launcher(self) -> None:
        """Check what can be checked before any process is started."""
        ranks = self.num_nodes * self.num_processes
        if self.shard_size is not None and (self.shard_size < 1 or ranks % self.shard_size):
            raise ValueError(f"strategy.shard_size must divide the number of ranks, {ranks}, got {self.shard_size}")
        if self.precision_plugin.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision must be one of {', '.join(PRECISIONS)} with fsdp2, got "
                f"{self.precision_plugin.precision!r}"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        """Join the ranks, and lay them out."""
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        shard = self.shard_size or self.world_size
        self._device_mesh = init_device_mesh(
            self.root_device.type, (self.world_size // shard, shard), mesh_dim_names=("replicate", "shard")
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the rows this rank reads."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # -------------------------------------------------------------------------------------------------------- sharding
    def setup(self, trainer: Trainer) -> None:
        """Shard both models, then build the optimizer over the shards."""
        module: Any = self.lightning_module
        assert module is not None
        if not isinstance(module.model, FSDPModule):
            if self.activation_checkpointing:
                checkpoint_activations(module.model.student)
            shard_student(module.model, **self.policies())
        if module.teacher is not None:
            module.teacher.shard(functools.partial(shard_teacher, **self.policies()))
        super().setup(trainer)

    def policies(self) -> dict[str, Any]:
        """Mesh, precision and offload, as `shard_student` and `shard_teacher` take them."""
        mesh = self.device_mesh["shard"] if self.device_mesh["replicate"].size() == 1 else self.device_mesh
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        mixed = self.precision_plugin.precision == "bf16-mixed"
        return {"mesh": mesh, "layer_dtype": torch.bfloat16 if mixed else None, "offload_policy": offload}

    def model_to_device(self) -> None:
        """Move what is not sharded: buffers, and the metrics."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)
        _update_properties(self.model, device=self.root_device)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="student and teacher sharded by FSDP2")


def data_ranks(trainer: Trainer) -> tuple[int, int]:
    """This process among those that read different rows: its number, and how many there are."""
    kwargs = trainer.distributed_sampler_kwargs or {}
    return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)
