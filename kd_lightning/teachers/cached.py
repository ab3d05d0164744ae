"""A teacher that is read from disk."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from kd_lightning.distributed.collectives import sum_over_ranks
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK, check_lower_bound
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.cache_format import (
    CacheManifest,
    CacheReader,
    DataDigest,
    next_token_mask,
    read_head,
    row_keys,
)


class CachedTeacher(Teacher):
    """What a teacher said, read from the folder that `kd-lightning cache` wrote; no teacher is loaded.

    Rows are found by their tokens, in whatever order and selection they come.

    Args:
        path: the folder.
        teacher: folder, hub name or `asset:` name of the teacher whose words these must be; None: taken on trust.

    Raises:
        ValueError: when the run starts: there is no finished cache, it is of another teacher, tokenizer, template or
            length, it lacks rows of the data, or what it holds cannot give this objective.
    """

    def __init__(self, path: str, teacher: str | None = None) -> None:
        self.path = path
        self.teacher = teacher
        self._description: CacheManifest | None = None
        self._shards: CacheReader | None = None
        self._head: Head | None = None
        self._device = torch.device("cpu")

    @property
    def name(self) -> None:
        """None: the tokenizer was compared when the cache was made."""
        return None

    @property
    def description(self) -> CacheManifest:
        """Whose words these are."""
        if self._description is None:
            folder = Path(self.path)
            found = CacheManifest.read(folder)
            if found.tokens is None:
                raise ValueError(f"teacher cache {folder} is not finished: the same command as before goes on with it")
            self._description = found
        return self._description

    @property
    def head(self) -> Head | None:
        """The teacher's head; None where the top k are kept."""
        return self._head

    def meet(self, module: Any) -> None:
        """Compare teacher, tokenizer, template, length and rows with what the run has."""
        kept, folder = self.description, Path(self.path)
        if self.teacher is not None:
            live = load_causal_lm(self.teacher, role="teacher")
            tensors = itertools.chain(live.named_parameters(), live.named_buffers())
            kept.check(folder, teacher_fingerprint=tensor_digest(tensors))
        if getattr(module, "responses", None) is not None:
            raise ValueError("a teacher cache holds no responses that are written while training: leave responses out")
        if kept.kind == "top_k":
            loss = module.model.loss
            check_lower_bound(loss.objective, module.monitors)
            if loss.token_loss.temperature != 1:
                raise ValueError(
                    f"temperature must be 1 with a teacher's top k, whose rest is unknown at another, got "
                    f"{loss.token_loss.temperature}"
                )
            rank_zero_info(
                f"teacher: {kept.k} tokens and the rest are known: divergences, measured ones too, are lower bounds"
            )
        trainer = getattr(module, "_trainer", None)
        datamodule = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "every_row"):
            kept.check(folder, **tokenizer_digests(datamodule))
            self._check_rows(datamodule, sum_over_ranks(trainer))

    def _check_rows(self, datamodule: Any, total: Callable[[Tensor], Tensor]) -> None:
        shards = self._opened()
        for split in datamodule.splits:
            digest, absent = DataDigest(), []
            for batch in datamodule.every_row(split):
                keys, counts = row_keys(batch), next_token_mask(batch["labels"]).any(1)
                digest.add(keys[counts])
                absent += batch["row_ids"][counts & (shards.find(keys) < 0)].tolist()
            count = int(total(torch.tensor(len(absent))))
            if count:
                first = "".join(f", {place} first" for place in datamodule.row_locations(split, absent[:1]))
                raise ValueError(
                    f"teacher cache {self.path} lacks {count} rows of {split}{first}: it was made of "
                    f"{self.description.data.get(split, 'none')}, this run has {digest}"
                )

    def load(self, device: torch.device | str = "cpu") -> None:
        """Open the folder."""
        self._opened()
        kept = self.description
        if self._head is None and kept.kind == "hidden":
            tensors = read_head(Path(self.path))
            self._head = Head(tensors["weight"], tensors.get("bias"), scale=kept.scale, softcap=kept.softcap)
        self.to(device)

    def _opened(self) -> CacheReader:
        if self._shards is None:
            self._shards = CacheReader(Path(self.path), self.description.digest)
        return self._shards

    def to(self, device: torch.device | str) -> None:
        """Move the head, and send what is read there."""
        device = torch.device(device)
        if self._head is not None and device != self._device:
            head = self._head
            bias = None if head.bias is None else head.bias.to(device)
            self._head = dataclasses.replace(head, weight=head.weight.to(device), bias=bias)
        self._device = device

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H], zero where the next token does not count."""
        return self._read(batch)["hidden"]

    def logits(self, batch: Mapping[str, Tensor]) -> Any:
        """Logits [B, T, V]; `TopK` of shape [B, T] where the top k are kept."""
        if self._head is None:
            return TopK(**self._read(batch), vocabulary=self.description.vocabulary)
        return project_logits(self._head, self.hidden(batch))

    def _read(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of a batch, in its shape."""
        labels, shards = batch["labels"], self._opened()
        counted = next_token_mask(labels)
        lengths = counted.sum(1).cpu()
        rows = shards.find(row_keys(batch))
        unknown = (lengths > 0) & ((rows < 0) | (shards.lengths[rows] != lengths))
        if unknown.any():
            ids = batch.get("row_ids", torch.arange(len(labels))).cpu()[unknown].tolist()
            raise ValueError(f"teacher cache {self.path} has no rows {', '.join(map(str, ids[:5]))}: other data")
        found = shards.take(rows[lengths > 0]) or {name: x[:0] for name, x in shards.tables[0].items()}
        out = {}
        for name, x in found.items():
            out[name] = x.new_zeros(*labels.shape, *x.shape[1:], device=labels.device)
            out[name][:, :-1][counted] = x.to(labels.device)
        return out

    def fingerprint(self) -> str:
        """The teacher's."""
        return self.description.teacher_fingerprint


def project_logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits of hidden states, in fp32."""
    bias = None if head.bias is None else head.bias.float()
    logits = F.linear(hidden.float(), head.weight.float(), bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def tokenizer_digests(datamodule: Any) -> dict[str, Any]:
    """Tokenizer, chat template and length of a data module, as a `Description` has them."""
    text = datamodule.text_tokenizer
    template = [text.chat_template or text.tokenizer.chat_template, text.template_kwargs]
    tokenizer = dataclasses.replace(text, chat_template="-", template_kwargs=None, max_length=0)
    return {
        "tokenizer": tokenizer.fingerprint(),
        "template": hashlib.sha256(json.dumps(template, sort_keys=True, default=str).encode()).hexdigest(),
        "max_length": text.max_length,
    }
