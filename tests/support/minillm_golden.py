"""The golden numbers of MiniLLM's own code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locations import GOLDEN

RECORDS = [
    record
    for record in json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["records"]
    if record["id"].startswith("minillm.")
]


def tensors(record: dict[str, Any]) -> dict[str, Tensor]:
    """The record's arrays by their last name."""
    with np.load(GOLDEN / "official_minillm.npz", allow_pickle=False) as file:
        return {name.split("/")[1]: torch.from_numpy(file[name]) for name in record["arrays"]}


def counted(x: dict[str, Tensor], hyper: dict[str, Any]) -> Tensor:
    """Response tokens whose input is not padding: the first end of sequence is one of them."""
    ids = torch.cat([x["query_ids"], x["response_ids"]], 1)
    return ids[:, hyper["query_len"] - 1 : -1] != hyper["pad_id"]
