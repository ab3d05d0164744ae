"""FSDP2 for two models: the student with its loss under one root, the teacher separately, both layer by layer."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.optim import Optimizer

from kd_lightning.atomic_io import atomic_folder, exhausted, partial_folder
from kd_lightning.distributed.checkpoint_io import ResizableState, open_checkpoint
from kd_lightning.distributed.collectives import all_gather_objects
from kd_lightning.distributed.dtensor import TENSOR, full_state_dict, full_tensor, local_shard, shard_like
from kd_lightning.distributed.fsdp2 import (
    ShardableModule,
    ShardableTeacher,
    ShardingOptions,
    shard_student,
    shard_teacher,
)
from kd_lightning.distributed.sharded_checkpoint import ShardReader, map_tensors, state_dict_mismatches, write_rank_file
from kd_lightning.distributed.vocab_parallel import split_vocabulary
from kd_lightning.engine.head import Head
from kd_lightning.models.hf_adapter import enable_activation_checkpointing
from kd_lightning.models.quantized.layers import check_not_quantized

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state of the student, and the parameters of the teacher, over ranks.

    Every rank reads different rows. Layers are gathered one at a time, in the dtype they compute in; the parameters
    outside of the layers (embedding, last norm, LM head) are gathered in their own dtype, so the loss reads the same
    numbers as on one device.

    Args:
        shard_size: ranks that read different rows and share one copy of the models; None: all of them. Fewer: one copy
            per group, gradients averaged over the groups (hybrid sharding).
        tensor_parallel_size: ranks that read the same rows and split the vocabularies of both LM heads (and of
            embeddings tied to them); each chunk of logits is gathered, so any loss reads the full vocabulary. With
            `shard_size` it must divide the number of ranks.
        activation_checkpointing: recompute the student's layers in backward instead of keeping their activations.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        save_distributed_checkpoint: write checkpoints as folders with one file per rank; False: as one plain file that
            rank 0 gathers tensor by tensor. Both can be resumed on any number of ranks, by any strategy.
        process_group_backend: of `torch.distributed`; None: chosen by the device.
        timeout: of one collective.

    Raises:
        ValueError: a size does not divide the number of ranks, or the trainer's precision is not supported.

    Examples:
        >>> from kd_lightning import FSDP2Strategy
        >>> strategy = FSDP2Strategy(shard_size=8, activation_checkpointing=True)  # for Trainer(strategy=...)
        >>> strategy.shard_size, strategy.tensor_parallel_size
        (8, 1)
    """

    def __init__(
        self,
        shard_size: int | None = None,
        tensor_parallel_size: int = 1,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.shard_size = shard_size
        self.tensor_parallel_size = tensor_parallel_size
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload
        self._reader: ShardReader | None = None

    # ----------------------------------------------------------------------------------------------------------- ranks
    def _configure_launcher(self) -> None:
        """Check the arguments before any process is started."""
        ranks = self.num_nodes * self.num_processes
        size = self.tensor_parallel_size
        if not 1 <= size <= ranks or ranks % size:
            raise ValueError(f"strategy.tensor_parallel_size must divide the number of ranks, {ranks}, got {size}")
        if self.shard_size is not None and (self.shard_size < 1 or ranks // size % self.shard_size):
            each = "" if size == 1 else f" (groups of {size} read the same rows)"
            raise ValueError(
                f"strategy.shard_size must divide the number of ranks, {ranks}{each}, got {self.shard_size}"
            )
        if self.precision_plugin.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision must be one of {', '.join(PRECISIONS)} with fsdp2, got "
                f"{self.precision_plugin.precision!r}"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        """Initialize the process group and the device mesh."""
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        split = self.tensor_parallel_size
        shard = self.shard_size or self.world_size // split
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (self.world_size // shard // split, shard, split),
            mesh_dim_names=("replicate", "shard", TENSOR),
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh  # as Lightning's own method does, which this replaces

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of the rows that this rank reads."""
        size = self.tensor_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    # -------------------------------------------------------------------------------------------------------- sharding
    def setup(self, trainer: Trainer) -> None:
        """Shard both models, then build the optimizer over the shards."""
        self.shard(self._module)
        super().setup(trainer)

    @property
    def _module(self) -> ShardableModule:
        """The module of the run, which Lightning declares as its own base class."""
        return cast("ShardableModule", self.lightning_module)

    def shard(self, module: ShardableModule) -> None:
        """Shard student and teacher in place; called again, nothing happens.

        Args:
            module: a `DistillationModule` with its models.
        """
        model = module.model
        assert model is not None  # `configure_model` runs first
        if not isinstance(model, FSDPModule):
            student: Any = model.student  # a Hugging Face model
            check_not_quantized(student, "student")
            if self.tensor_parallel_size > 1:
                self._check_head("student", model.head())
                split_vocabulary(student, self.device_mesh[TENSOR], "student")
            if self.activation_checkpointing:
                enable_activation_checkpointing(student)
            shard_student(model, **self.sharding_options())
        for teacher in () if module.teacher is None else module.teacher.members.values():
            teacher.shard(functools.partial(self._shard_teacher, teacher))

    def _shard_teacher(self, teacher: ShardableTeacher, model: Any) -> nn.Module:
        if self.tensor_parallel_size > 1:
            self._check_head("teacher", teacher.head)
            split_vocabulary(model, self.device_mesh[TENSOR], "teacher")
        return shard_teacher(model, **self.sharding_options())

    def _check_head(self, role: str, head: Head | None) -> None:
        if head is None:
            raise ValueError(
                f"strategy.tensor_parallel_size must be 1 for a {role} that cannot be split into backbone and LM head, "
                f"got {self.tensor_parallel_size}"
            )

    def sharding_options(self) -> ShardingOptions:
        """Meshes, precision and offload: arguments of `shard_student` and `shard_teacher`."""
        mesh = self.device_mesh
        replicate = ("replicate",) if mesh["replicate"].size() > 1 else ()
        options: ShardingOptions = {
            "mesh": mesh[(*replicate, "shard")],
            "layer_dtype": torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None,
            "offload_policy": OffloadPolicy(),
        }
        if self.tensor_parallel_size > 1:  # layers have no vocabulary to split: they are sharded over these ranks too
            both = mesh["shard", TENSOR]._flatten("all")
            options["layer_mesh"] = mesh[(*replicate, "all")] if replicate else both
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        return options

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Reduce gradients between the groups of a hybrid shard only in the last micro-batch of a step."""
        model = cast("FSDPModule", self._module.model)
        model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            model.set_requires_all_reduce(True)

    def model_to_device(self) -> None:
        """Move everything that is not sharded: buffers and metrics."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.root_device))
        _update_properties(self.model, device=self.root_device)

    # ----------------------------------------------------------------------------------------------------- checkpoints
    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: `load_optimizer_state_dict` below reads the state of the optimizer."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Tensors of the module: shards; or full tensors on rank 0 and nothing on other ranks."""
        assert self.model is not None
        if self._save_distributed_checkpoint:
            return self.model.state_dict()
        return full_state_dict(self.model, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer, by parameter index as on one device: shards, or full tensors on rank 0."""
        unwrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = unwrapped.state_dict()
        if self._save_distributed_checkpoint:
            return state

        def gathered(_: str, tensor: Tensor) -> Tensor | None:
            full = full_tensor(tensor)
            return full.cpu() if self.is_global_zero else None

        return map_tensors(state, gathered)  # type: ignore[no-any-return]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file from rank 0 or a folder from all ranks, replacing an old one when the new one is complete."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            ParallelStrategy.save_checkpoint(self, checkpoint, path, storage_options)
            return
        if not self.is_global_zero:
            self._write_rank_file(checkpoint, partial_folder(path))
            return
        with atomic_folder(path) as part:
            self._write_rank_file(checkpoint, part)

    def _write_rank_file(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write this rank's file, and check that the other ranks have written theirs."""
        self.barrier("the folder exists")
        failure: str | None = None
        try:
            write_rank_file(checkpoint, folder, self.global_rank)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = str(error) if (limit := exhausted(error, folder)) is None else os.strerror(limit)
        for rank, reason in enumerate(all_gather_objects(failure, self.world_size)):
            if reason is not None:
                raise OSError(f"{folder} could not be written by rank {rank}: {reason}")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a file or a folder, whose tensors are read later; ValueError if it is no checkpoint of a run."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = open_checkpoint(path)
        self._reader = ShardReader(path) if path.is_dir() else None
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's rows of every tensor into the module; ValueError if it is another model or objective."""
        assert self.model is not None
        state = checkpoint["state_dict"]
        for prefix, module in self.model.named_modules():
            if isinstance(module, ResizableState):
                module.resize_to(
                    {n.removeprefix(f"{prefix}."): x for n, x in state.items() if n.startswith(f"{prefix}.")}
                )
        own = self.model.state_dict()
        problems = state_dict_mismatches(own, state)
        if strict and problems:
            raise ValueError(f"the checkpoint belongs to another model or objective: {problems[0]}")
        with torch.no_grad():
            for name in own.keys() & state.keys():
                held, loaded = own[name], self._shard(state[name], own[name], f"/state_dict/{name}")
                local_shard(held).copy_(local_shard(loaded))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's rows of the state into every optimizer."""
        for i, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {
                    key: self._shard(value, parameters[number], f"/optimizer_states/{i}/state/{number}/{key}")
                    for key, value in entries.items()
                }
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _shard(self, value: Any, like: Tensor, path: str) -> Any:
        """This rank's rows of a tensor of the checkpoint; a value without the shape of its parameter as it is."""
        if not isinstance(value, Tensor) or value.shape != like.shape or value.ndim == 0:
            return value
        if value.is_meta:
            assert self._reader is not None
            return shard_like(functools.partial(self._reader.read, path), like)
        return shard_like(lambda start, stop: value[start:stop], like)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="student and teacher sharded by FSDP2")
