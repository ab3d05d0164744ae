"""LM heads and embeddings split over the vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kd_lightning.distributed.dtensor import TENSOR, _part
from kd_lightning.engine.head import Head


def split_vocabulary(model: Any, mesh: DeviceMesh, role: str) -> None:
    """Give each rank of a group its part of a model's head (and of its embedding, where they are one).

    Args:
        model: a Hugging Face model.
        mesh: one dimension, called `tensor`.
        role: `student` or `teacher`, for the error.

    Raises:
        ValueError: the vocabulary cannot be divided by the size of the group.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied, learns = head.weight is embedding.weight, head.weight.requires_grad
    if len(head.weight) % mesh.size():
        raise ValueError(
            f"strategy.tensor_parallel_size must divide the {role}'s vocabulary, {len(head.weight)}, got {mesh.size()}"
        )
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)
    if tied:
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
        head.weight = embedding.weight
    for parameter in (*head.parameters(), *(embedding.parameters() if tied else ())):
        parameter.requires_grad_(learns)


def head_on_rank(head: Head) -> Head:
    """A head with what this rank needs of it: its part of a vocabulary that is split, else all; ranks ask together."""
    if not isinstance(head.weight, DTensor):
        return head
    mesh = head.weight.device_mesh
    split = TENSOR in (mesh.mesh_dim_names or ())
    bias = head.bias
    return dataclasses.replace(
        head,
        weight=_part(head.weight),
        bias=_part(bias) if isinstance(bias, DTensor) else bias,
        group=mesh.get_group(TENSOR) if split else None,
    )
