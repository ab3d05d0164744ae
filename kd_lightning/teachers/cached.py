"""A teacher whose outputs are read from a cache on disk."""

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

from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.top_k import TopK
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.paths import expand_path
from kd_lightning.teachers.base import RunContext, Teacher, TokenizedData
from kd_lightning.teachers.batches import teacher_batch
from kd_lightning.teachers.cache_format import (
    DTYPES,
    MANIFEST,
    CacheManifest,
    CacheReader,
    DataDigest,
    read_head,
    row_keys,
)
from kd_lightning.teachers.planning.sources import CachedOutputs


class CachedTeacher(Teacher):
    """A teacher's outputs, read from a folder that `kd-lightning cache` has written; no teacher is loaded.

    Rows are found by their tokens, in any order and any selection.

    Args:
        path: the folder.
        teacher: folder, hub name or `asset:` name of the teacher that must have written the cache; None: not checked.

    Raises:
        ValueError: when the run starts: there is no complete cache; it was written for another teacher, tokenizer,
            template or length; rows of the data are missing; or its kind does not suffice for this objective.

    Examples:
        >>> from kd_lightning import CachedTeacher, DistillationModule
        >>> module = DistillationModule("asset:student", CachedTeacher("runs/cache"))
        >>> module.teacher.cached_outputs is None  # there is no cache yet: run `kd-lightning cache`
        True
    """

    def __init__(self, path: str, teacher: str | None = None) -> None:
        self.path = expand_path(path)
        self.teacher = teacher
        self._description: CacheManifest | None = None
        self._reader: CacheReader | None = None
        self._head: Head | None = None
        self._device = torch.device("cpu")

    @property
    def name(self) -> None:
        """None: the tokenizer was compared when the cache was made."""
        return None

    @property
    def description(self) -> CacheManifest:
        """The manifest of the cache."""
        if self._description is None:
            folder = Path(self.path)
            found = CacheManifest.read(folder)
            if found.tokens is None:
                raise ValueError(
                    f"teacher cache {folder} is incomplete: rerun the command that was writing it to resume"
                )
            self._description = found
        return self._description

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the cached distributions cover."""
        return self.description.vocabulary

    @property
    def knows_all_tokens(self) -> bool:
        """Whether hidden states are cached."""
        return self.description.kind == "hidden"

    @property
    def head(self) -> Head | None:
        """The teacher's LM head; None if only the top k are cached."""
        return self._head

    @property
    def cached_outputs(self) -> CachedOutputs | None:
        """Shapes of what is cached; None if there is no cache yet."""
        folder = Path(self.path)
        if not (folder / MANIFEST).exists():
            return None
        found = self.description
        if found.kind == "top_k":
            return CachedOutputs(found.vocabulary, DTYPES[found.dtype], k=found.k)
        vocabulary, width = read_head(folder)["weight"].shape
        return CachedOutputs(found.vocabulary, DTYPES[found.dtype], head=(vocabulary, width))

    def attach(self, run: RunContext) -> None:
        """Compare teacher, tokenizer, template, length and rows of the cache with those of the run."""
        manifest, folder = self.description, Path(self.path)
        if self.teacher is not None:
            live = load_causal_lm(self.teacher, role="teacher")
            tensors = itertools.chain(live.named_parameters(), live.named_buffers())
            manifest.check(folder, teacher_fingerprint=tensor_digest(tensors))
        if run.generates_responses:
            raise ValueError(
                "a teacher cache holds no responses that are generated during the run: leave responses out, or name "
                "the teacher itself"
            )
        if manifest.kind == "top_k":
            run.check_top_k_loss()
            rank_zero_info(
                f"teacher: {manifest.k} tokens and the mass of the others are known: divergences, monitored ones too, "
                "are lower bounds"
            )
        if run.data is not None:
            manifest.check(folder, **tokenizer_digests(run.data))
            self._check_rows(run.data, run.sum_over_ranks)

    def _check_rows(self, data: TokenizedData, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        reader = self._opened()
        for split in data.splits:
            digest, missing = DataDigest(), []
            for batch in map(teacher_batch, data.every_row(split)):
                keys, labeled = row_keys(batch), next_token_mask(batch["labels"]).any(1)
                digest.add(keys[labeled])
                missing += batch["row_ids"][labeled & (reader.find(keys) < 0)].tolist()
            count = int(sum_over_ranks(torch.tensor(len(missing))))
            if count:
                first = "".join(f" (the first is {location})" for location in data.row_locations(split, missing[:1]))
                raise ValueError(
                    f"teacher cache {self.path} lacks {count} rows of {split}{first}: it was written for "
                    f"{self.description.data.get(split, 'none')}, this run has {digest}; run `kd-lightning cache` with "
                    "the arguments of this run to add them"
                )

    def load(self, device: torch.device | str = "cpu") -> None:
        """Open the folder."""
        self._opened()
        manifest = self.description
        if self._head is None and manifest.kind == "hidden":
            tensors = read_head(Path(self.path))
            self._head = Head(tensors["weight"], tensors.get("bias"), scale=manifest.scale, softcap=manifest.softcap)
        self.to(device)

    def _opened(self) -> CacheReader:
        if self._reader is None:
            self._reader = CacheReader(Path(self.path), self.description.digest)
        return self._reader

    def to(self, device: torch.device | str) -> None:
        """Move the LM head; outputs go to the device of the batch."""
        device = torch.device(device)
        if self._head is not None and device != self._device:
            head = self._head
            bias = None if head.bias is None else head.bias.to(device)
            self._head = dataclasses.replace(head, weight=head.weight.to(device), bias=bias)
        self._device = device

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H], zero where the next token has no label."""
        return self._read(batch)["hidden"]

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor | TopK:
        """Logits [B, T, V]; `TopK` of shape [B, T] if only the top k are cached."""
        if self._head is None:
            return TopK(**self._read(batch), vocabulary=self.description.vocabulary)
        return self._head.logits(self.hidden(batch))

    def _read(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cached tensors of a batch, by name, each [B, T, …]."""
        labels, reader = batch["labels"], self._opened()
        labeled = next_token_mask(labels)
        lengths = labeled.sum(1).cpu()
        rows = reader.find(row_keys(batch))
        unknown = (lengths > 0) & ((rows < 0) | (reader.lengths[rows] != lengths))
        if unknown.any():
            ids = batch.get("row_ids", torch.arange(len(labels))).cpu()[unknown].tolist()
            raise ValueError(
                f"teacher cache {self.path} has no rows {', '.join(map(str, ids[:5]))}: it was written for other data"
            )
        found = reader.take(rows[lengths > 0]) or {name: x[:0] for name, x in reader.tables[0].items()}
        out = {}
        for name, x in found.items():
            out[name] = x.new_zeros(*labels.shape, *x.shape[1:], device=labels.device)
            out[name][:, :-1][labeled] = x.to(labels.device)
        return out

    def fingerprint(self) -> str:
        """The fingerprint of the teacher that wrote the cache."""
        return self.description.teacher_fingerprint


def tokenizer_digests(data: TokenizedData) -> dict[str, Any]:
    """Tokenizer, chat template and length of the data, as fields of a `CacheManifest`."""
    text = data.text_tokenizer
    template = [text.chat_template or text.tokenizer.chat_template, text.template_kwargs]
    template += [text.written_date] if text.written_date is not None else []
    tokenizer = dataclasses.replace(text, chat_template="-", template_kwargs=None, max_length=0)
    return {
        "tokenizer": tokenizer.fingerprint(),
        "template": hashlib.sha256(json.dumps(template, sort_keys=True, default=str).encode()).hexdigest(),
        "max_length": text.max_length,
    }
