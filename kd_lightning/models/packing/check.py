"""The check that a model computes for packed rows what it computes for the rows alone."""

from __future__ import annotations

import torch
from torch import nn

from kd_lightning.models.backbone import eval_mode, hidden_states, logits
from kd_lightning.models.hf_adapter import base_model
from kd_lightning.models.model_checks import Role


def check_packing(model: nn.Module, body: nn.Module | None, role: Role) -> None:
    """Check that a model computes for packed rows what it computes for the rows alone.

    The difference may be as large as four times that of padded rows, and the rounding of the dtype.

    Args:
        model: a Hugging Face causal language model.
        body: its backbone; None: it cannot be split, and its logits are compared.
        role: for the message.

    Raises:
        ValueError: it does not (recurrent layers, attention that reads no positions), or takes no positions.
    """
    part, function = (model, logits) if body is None else (body, hidden_states)
    device, name = next(part.parameters()).device, type(base_model(model)).__name__
    lengths = torch.tensor([3, 10, 4, 2], device=device).unsqueeze(1)
    mask = (torch.arange(10, device=device) < lengths).long()
    ids = (5 + torch.arange(mask.numel(), device=device).view_as(mask) % 13) * mask
    with eval_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        padded = function(part, ids, mask)[mask.bool()].float()
        rows = zip(ids, lengths.flatten().tolist(), strict=True)
        alone = torch.cat([function(part, row[:n].unsqueeze(0))[0].float() for row, n in rows])
        try:
            packed = function(part, ids, mask, packed=True)[mask.bool()].float()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"it takes no position_ids ({error})".replace("\n", " ")
            raise ValueError(_cannot_pack(role, name, reason)) from None
    sizes = alone.norm(dim=-1)
    noise, found = (((x - alone).norm(dim=-1) / sizes).max().item() for x in (padded, packed))
    if not found <= 4 * noise + max(1e-5, torch.finfo(next(part.parameters()).dtype).eps):
        raise ValueError(_cannot_pack(role, name, f"packed rows change each other's outputs, by up to {found:.2g}"))


def _cannot_pack(role: Role, name: str, reason: str) -> str:
    return f"packing must be false for the {role} {name}: {reason}; set data.packing to false"
