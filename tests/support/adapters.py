"""Models with adapters that are not zero."""

from __future__ import annotations

import torch
from torch import nn


def stirred(student: nn.Module, std: float = 0.1) -> nn.Module:
    """The same student as if it had learnt: B is no longer zero, DoRA's lengths are others."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1) if "magnitude" in name else parameter.normal_(std=std)
    return student
