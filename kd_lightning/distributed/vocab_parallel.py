"""LM heads and embeddings split over the vocabulary."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kd_lightning.distributed.dtensor import TENSOR, vocabulary_shard
from kd_lightning.engine.head import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split_vocabulary(model: PreTrainedModel, mesh: DeviceMesh, role: str) -> None:
    """Split the LM head of a model (and its embedding, if the two are tied) over the ranks of a mesh, in place.

    Args:
        model: a causal LM with a plain LM head.
        mesh: one dimension, named `tensor`.
        role: `student` or `teacher`, for the error message.

    Raises:
        ValueError: the vocabulary is not divisible by the size of the mesh.
    """
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    tied, trainable = head.weight is embedding.weight, head.weight.requires_grad
    if len(head.weight) % mesh.size():
        raise ValueError(
            f"strategy.tensor_parallel_size must divide the {role}'s vocabulary, {len(head.weight)}, got {mesh.size()}"
        )
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)
    if tied:
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
        head.weight = embedding.weight
    for parameter in (*head.parameters(), *(embedding.parameters() if tied else ())):
        parameter.requires_grad_(trainable)


def head_on_rank(head: Head) -> Head:
    """The LM head with the weights that this rank computes with: its part of a split vocabulary, else all of them.

    A collective where the weights are sharded: all ranks must call it.
    """
    if not isinstance(head.weight, DTensor):
        return head
    mesh = head.weight.device_mesh
    split = TENSOR in (mesh.mesh_dim_names or ())
    bias = head.bias
    return dataclasses.replace(
        head,
        weight=vocabulary_shard(head.weight),
        bias=vocabulary_shard(bias) if isinstance(bias, DTensor) else bias,
        group=mesh.get_group(TENSOR) if split else None,
    )
