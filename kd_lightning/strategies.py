"""FSDP2 for two models: the student and its loss under one root, the teacher beside them, layer by layer."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.optim import Optimizer

from kd_lightning.atomic_io import atomic_folder, disk_is_full, partial_folder
from kd_lightning.distributed.checkpoint_io import open_checkpoint
from kd_lightning.distributed.collectives import all_gather_objects
from kd_lightning.distributed.dtensor import TENSOR, full_state_dict, full_tensor, local_shard, shard_like
from kd_lightning.distributed.fsdp2 import shard_student, shard_teacher
from kd_lightning.distributed.sharded_checkpoint import ShardReader, map_tensors, write_rank_file
from kd_lightning.distributed.vocab_parallel import split_vocabulary
from kd_lightning.models.hf_adapter import enable_activation_checkpointing

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state of the student spread over ranks; the teacher's parameters too.

    Every rank reads its own rows. Layers are gathered one at a time, in the precision they compute in; what stands
    around them (embedding, last norm, head) is gathered as it is, so that the loss reads what it reads on one device.

    Args:
        shard_size: ranks that read different rows and share one copy of the models; None: all of them. Fewer: a copy in
            every group, gradients averaged between groups (hybrid shard).
        tensor_parallel_size: ranks that read the same rows and split the vocabularies of both heads (and of embeddings
            tied to them) among them; each chunk of logits is gathered, so that any loss sees whole rows. With
            `shard_size` it must divide the number of ranks.
        activation_checkpointing: compute the student's layers again in backward instead of keeping what they computed.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        save_distributed_checkpoint: write checkpoints as folders in which every rank has its file; False: as one plain
            file that rank 0 gathers tensor by tensor. Both can be resumed on any number of ranks, by any strategy.
        process_group_backend: of `torch.distributed`; None: by the device.
        timeout: of one collective.

    Raises:
        ValueError: a size does not divide the number of ranks; the trainer's precision is none that it can do.
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
        self._pieces: ShardReader | None = None

    # ----------------------------------------------------------------------------------------------------------- ranks
    def _configure_launcher(self) -> None:
        """Check what can be checked before any process is started."""
        ranks = self.num_nodes * self.num_processes
        size = self.tensor_parallel_size
        if not 1 <= size <= ranks or ranks % size:
            raise ValueError(f"strategy.tensor_parallel_size must divide the number of ranks, {ranks}, got {size}")
        if self.shard_size is not None and (self.shard_size < 1 or ranks // size % self.shard_size):
            each = "" if size == 1 else f" with the same rows on {size} of them each"
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
        """Join the ranks, and lay them out."""
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
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the rows this rank reads."""
        size = self.tensor_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    # -------------------------------------------------------------------------------------------------------- sharding
    def setup(self, trainer: Trainer) -> None:
        """Shard both models, then build the optimizer over the shards."""
        assert self.lightning_module is not None
        self.shard(self.lightning_module)
        super().setup(trainer)

    def shard(self, module: Any) -> None:
        """Spread student and teacher over the ranks.

        Args:
            module: a `DistillationModule` with its models; called again, nothing happens.
        """
        if not isinstance(module.model, FSDPModule):
            if self.tensor_parallel_size > 1:
                self._check_cut("student", module.model.head())
                split_vocabulary(module.model.student, self.device_mesh[TENSOR], "student")
            if self.activation_checkpointing:
                enable_activation_checkpointing(module.model.student)
            shard_student(module.model, **self.policies())
        if module.teacher is not None:
            module.teacher.shard(self._shard_teacher)

    def _shard_teacher(self, model: nn.Module) -> nn.Module:
        if self.tensor_parallel_size > 1:
            self._check_cut("teacher", self.lightning_module.teacher.head)  # type: ignore[union-attr]
            split_vocabulary(model, self.device_mesh[TENSOR], "teacher")
        return shard_teacher(model, **self.policies())

    def _check_cut(self, role: str, head: object) -> None:
        if head is None:
            raise ValueError(
                f"strategy.tensor_parallel_size must be 1 where the {role} cannot be cut into body and head, got "
                f"{self.tensor_parallel_size}"
            )

    def policies(self) -> dict[str, Any]:
        """Meshes, precision and offload, as `shard_student` and `shard_teacher` take them."""
        whole = self.device_mesh
        copies = ("replicate",) if whole["replicate"].size() > 1 else ()
        meshes = {"mesh": whole[(*copies, "shard")]}
        if self.tensor_parallel_size > 1:  # layers have no vocabulary to split: sharded over these ranks too
            both = whole["shard", TENSOR]._flatten("all")
            meshes["layer_mesh"] = whole[(*copies, "all")] if copies else both
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        mixed = self.precision_plugin.precision == "bf16-mixed"
        return {**meshes, "layer_dtype": torch.bfloat16 if mixed else None, "offload_policy": offload}

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let copies of a hybrid shard hear of each other only at the last micro-batch of a step."""
        module: Any = self.lightning_module
        module.model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            module.model.set_requires_all_reduce(True)

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

    # ----------------------------------------------------------------------------------------------------- checkpoints
    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is read like any other, below."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Tensors of the module: shards, or whole on rank 0 and nothing elsewhere."""
        assert self.model is not None
        if self._save_distributed_checkpoint:
            return self.model.state_dict()
        return full_state_dict(self.model, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer, by the numbers of its parameters as on one device: shards, or whole on rank 0."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state: dict[str, Any] = optimizer.state_dict()
        if self._save_distributed_checkpoint:
            return state

        def gathered(_: str, tensor: Tensor) -> Tensor | None:
            full = full_tensor(tensor)
            return full.cpu() if self.is_global_zero else None

        return map_tensors(state, gathered)  # type: ignore[no-any-return]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a file from rank 0, or a folder from all ranks; what lay there stays whole until the new one is."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            ParallelStrategy.save_checkpoint(self, checkpoint, path, storage_options)
            return
        if not self.is_global_zero:
            self._write_part(checkpoint, partial_folder(path))
            return
        with atomic_folder(path) as part:
            self._write_part(checkpoint, part)

    def _write_part(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write this rank's file, and see that the others have written theirs."""
        self.barrier("the folder is there")
        failure: str | None = None
        try:
            write_rank_file(checkpoint, folder, self.global_rank)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = os.strerror(errno.ENOSPC) if disk_is_full(folder) else str(error)
        for rank, reason in enumerate(all_gather_objects(failure, self.world_size)):
            if reason is not None:
                raise OSError(f"{folder} could not be written by rank {rank}: {reason}")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a file or a folder; tensors are read when `load_model_state_dict` and the optimizer ask for their rows.

        Raises:
            ValueError: it is no checkpoint of a run.
        """
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = open_checkpoint(path)
        self._pieces = ShardReader(path) if path.is_dir() else None
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's rows of every tensor into the module.

        Raises:
            ValueError: the checkpoint is another model's or another objective's.
        """
        assert self.model is not None
        state = checkpoint["state_dict"]
        for place, module in self.model.named_modules():
            if hasattr(module, "fit_to"):  # its tensors grow in a run
                module.fit_to({n.removeprefix(f"{place}."): x for n, x in state.items() if n.startswith(f"{place}.")})
        own = self.model.state_dict()
        problems = [f"Missing {name!r}" for name in own if name not in state]
        problems += [f"Unexpected {name!r}" for name in state if name not in own]
        problems += [
            f"{name!r} has shape {list(state[name].shape)} there and {list(tensor.shape)} here"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if strict and problems:
            raise ValueError(f"the checkpoint belongs to another model or objective: {problems[0]}")
        with torch.no_grad():
            for name in own.keys() & state.keys():
                held, loaded = own[name], self._shard(state[name], own[name], f"/state_dict/{name}")
                local_shard(held).copy_(local_shard(loaded))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every optimizer this rank's rows of its state."""
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
        """This rank's rows of a tensor of the checkpoint; anything that has not the shape of its parameter as it is."""
        if not isinstance(value, Tensor) or value.shape != like.shape or value.ndim == 0:
            return value
        if value.is_meta:
            assert self._pieces is not None
            return shard_like(functools.partial(self._pieces.read, path), like)
        return shard_like(lambda start, stop: value[start:stop], like)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="student and teacher sharded by FSDP2")
