"""Format of a teacher cache: a folder of safetensors shards whose rows are found by a hash of their tokens.

`cache.json` is the manifest; `head.safetensors` has the teacher's LM head if hidden states are cached. A shard holds
complete rows one after the other: their `keys` and `lengths`, and for each labeled token the teacher's output. Writes
are atomic: a shard is complete or absent, and is never rewritten.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_lightning.atomic_io import atomic_file
from kd_lightning.constants import IGNORE_INDEX

VERSION = 1
MANIFEST, HEAD = "cache.json", "head.safetensors"
KINDS = ("hidden", "top_k")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0

# Fields that must agree between a cache and a run, and their names in messages.
NAMES = {
    "teacher_fingerprint": "teacher",
    "tokenizer": "tokenizer",
    "template": "chat template",
    "max_length": "max_length",
    "kind": "kind",
    "k": "k",
    "dtype": "dtype",
    "vocabulary": "vocabulary",
}


@dataclass(frozen=True)
class CacheManifest:
    """Describes a cache: which teacher, which rows, and how its outputs are stored.

    Args:
        teacher: its name, for messages.
        teacher_fingerprint: a digest of its weights.
        tokenizer: a digest of the tokenizer of the rows.
        template: a digest of the chat template.
        max_length: longest row in tokens; longer ones were truncated.
        kind: `hidden` or `top_k`.
        dtype: of the stored tensors.
        k: tokens stored of each distribution.
        vocabulary: number of tokens that the distributions cover.
        scale: of the teacher's LM head.
        softcap: of the teacher's LM head.
        data: by split, the number of rows and a digest of them.
        tokens: number of cached tokens; None: the cache is incomplete.
        version: of this format.
    """

    teacher: str
    teacher_fingerprint: str
    tokenizer: str
    template: str
    max_length: int
    kind: str
    dtype: str
    k: int | None
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    data: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None
    version: int = VERSION

    @property
    def digest(self) -> str:
        """The mark of shards that belong to this manifest."""
        values = [getattr(self, name) for name in NAMES]
        return hashlib.sha256(json.dumps([self.version, *values]).encode()).hexdigest()

    def check(self, folder: Path, **run: Any) -> None:
        """Compare with the values of a run.

        Args:
            folder: of the cache.
            run: fields of a manifest.

        Raises:
            ValueError: a field differs; the message has both values.
        """
        for name, value in run.items():
            own = getattr(self, name)
            if own != value:
                at = f" ('{self.teacher}')" if name == "teacher_fingerprint" else ""
                raise ValueError(
                    f"teacher cache {folder} was written for another {NAMES[name]}: it has {_short(own)}{at}, this run "
                    f"has {_short(value)}; choose another folder, or the settings that the cache was written with"
                )

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        with atomic_file(folder / MANIFEST) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CacheManifest:
        """Read the manifest of a folder.

        Raises:
            ValueError: there is none, or it has another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"no teacher cache in {folder} (no {MANIFEST}): run `kd-lightning cache` to write one")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version = found.get("version")
            known = {name.name for name in fields(cls)}
            if version == VERSION and known == found.keys():
                return cls(**found)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            version = "none"
        raise ValueError(f"{path} must be the manifest of a teacher cache of version {VERSION}, got version {version}")


def _short(value: Any) -> str:
    """The first digits of a digest; other values in full."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


# --------------------------------------------------------------------------------------------------------------- rows
def row_keys(batch: Mapping[str, Tensor]) -> Tensor:
    """A 128-bit hash of each row's tokens and label mask, as two integers [B, 2]; padding does not change it."""
    ids, mask, labels = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask", "labels"))
    keys = np.empty((len(ids), 2), dtype=np.int64)
    for n, there in enumerate(mask.astype(bool)):
        text = ids[n][there].astype(np.int32).tobytes() + (labels[n][there] != IGNORE_INDEX).tobytes()
        keys[n] = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.int64)
    return torch.from_numpy(keys)


class CacheReader:
    """Reads the rows of a folder by memory mapping.

    Args:
        folder: with a manifest.
        digest: of the manifest; shards must carry it.

    Raises:
        ValueError: a shard cannot be read, or belongs to another cache.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.tables: list[dict[str, Tensor]] = []
        keys, lengths, shards, starts = [], [], [], []
        for path in sorted(folder.glob("shard-*.safetensors")):
            table = _open(path, digest)
            length = table.pop("lengths").long()
            keys.append(table.pop("keys"))
            lengths.append(length)
            starts.append(length.cumsum(0) - length)
            shards.append(torch.full_like(length, len(self.tables)))
            self.tables.append(table)
        none = torch.zeros(0, dtype=torch.long)
        order = torch.argsort(torch.cat([*(key[:, 0] for key in keys), none]), stable=True)
        self.keys = torch.cat([*keys, none.view(0, 2)])[order]
        self.first = self.keys[:, 0].contiguous()
        self.lengths, self.starts, self.shards = (torch.cat([*x, none])[order] for x in (lengths, starts, shards))

    def find(self, keys: Tensor) -> Tensor:
        """Index of each row, [B]; −1 if it is not cached."""
        if not len(self.first):
            return torch.full((len(keys),), -1)
        at = torch.searchsorted(self.first, keys[:, 0].contiguous()).clamp_max(len(self.first) - 1)
        return torch.where((self.keys[at] == keys).all(1), at, -1)

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """Cached tensors of these rows by name, one row after the other."""
        spans = zip(*(x[rows].tolist() for x in (self.shards, self.starts, self.lengths)), strict=True)
        pieces = [{name: x[a : a + n] for name, x in self.tables[shard].items()} for shard, a, n in spans]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}

    @property
    def tokens(self) -> int:
        """Number of cached tokens."""
        return int(self.lengths.sum())


def _open(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            mark = (file.metadata() or {}).get("description")
            table = {name: file.get_tensor(name) for name in file.keys()}  # memory-mapped: read on access
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if mark != digest or not {"keys", "lengths"} <= table.keys():
        raise ValueError(f"{path} belongs to another cache than {path.with_name(MANIFEST)}: move or delete it")
    return table


class CacheWriter:
    """Writes rows into new shards of a folder.

    Args:
        folder: with a manifest.
        digest: of the manifest.
        rank: of this process: several write at the same time.
        shard_bytes: size from which on a shard is complete.
        seconds: time after which the rows that were added are written in any case.
    """

    def __init__(
        self, folder: Path, digest: str, rank: int = 0, shard_bytes: int = SHARD_BYTES, seconds: float = SHARD_SECONDS
    ) -> None:
        self.folder, self.digest, self.rank, self.shard_bytes, self.seconds = folder, digest, rank, shard_bytes, seconds
        self.flushed = time.monotonic()
        self.parts: list[dict[str, Tensor]] = []
        self.bytes = 0

    def add(self, keys: Tensor, lengths: Tensor, tokens: Mapping[str, Tensor]) -> None:
        """Add rows.

        Args:
            keys: [B, 2].
            lengths: labeled tokens of each row, [B].
            tokens: their tensors by name, [sum of lengths, …].
        """
        self.parts.append({"keys": keys, "lengths": lengths.int(), **tokens})
        self.bytes += sum(x.numel() * x.element_size() for x in tokens.values())
        if self.bytes >= self.shard_bytes or time.monotonic() - self.flushed > self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows added so far."""
        self.flushed = time.monotonic()
        if not self.parts:
            return
        table = {name: torch.cat([part[name] for part in self.parts]).contiguous() for name in self.parts[0]}
        taken = {path.name for path in self.folder.glob("shard-*")}
        names = (f"shard-{self.rank:05d}-{n:06d}.safetensors" for n in itertools.count())
        path = self.folder / next(name for name in names if name not in taken)
        with atomic_file(path) as part:
            save_file(table, part, metadata={"description": self.digest})
        self.parts, self.bytes = [], 0


def write_head(folder: Path, weight: Tensor, bias: Tensor | None) -> None:
    """Write the teacher's LM head."""
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    with atomic_file(folder / HEAD) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)


def read_head(folder: Path) -> dict[str, Tensor]:
    """Read the teacher's LM head.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    try:
        return load_file(folder / HEAD)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / HEAD} cannot be read: {str(error).splitlines()[0]}") from None


class DataDigest:
    """A digest of rows that does not depend on their order and can be summed over ranks."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.long)

    def add(self, keys: Tensor) -> None:
        """Add rows."""
        self.sums += torch.cat([keys.sum(0), torch.tensor([len(keys)])])

    def __str__(self) -> str:
        a, b, count = self.sums.tolist()
        return f"{count} rows {(a % 2**64) ^ (b % 2**64):016x}"


def updated(manifest: CacheManifest, data: dict[str, str], tokens: int | None) -> CacheManifest:
    """The manifest after these splits have been cached."""
    return replace(manifest, data={**manifest.data, **data}, tokens=tokens)
