"""What a teacher said about counted tokens, in a folder: shards of safetensors, rows found by what they hold.

`cache.json` says whose words these are; `head.safetensors` has the teacher's head, where its hidden states are kept. A
shard holds whole rows one after the other: their `keys` and `lengths`, and for each counted token what was said of it.
A shard is there whole or not at all, and is never written again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
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

# What must agree, and how it is called in front of a user.
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
    """Whose words a cache holds, of which rows, and how they are kept.

    Args:
        teacher: its name, for people.
        teacher_fingerprint: a digest of its weights.
        tokenizer: a digest of the tokenizer the rows were read with.
        template: a digest of the chat template.
        max_length: where rows were cut.
        kind: `hidden` or `top_k`.
        dtype: of what is kept.
        k: tokens kept of each distribution.
        vocabulary: tokens that the teacher speaks of.
        scale: of the teacher's head.
        softcap: of the teacher's head.
        data: by split, how many rows and a digest of them.
        tokens: counted tokens that are kept; None: not all are yet.
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
        """What shards are marked with: they belong to this description and no other."""
        kept = [getattr(self, name) for name in NAMES]
        return hashlib.sha256(json.dumps([self.version, *kept]).encode()).hexdigest()

    def check(self, folder: Path, **run: Any) -> None:
        """Compare with what a run has.

        Args:
            folder: where this lies.
            run: fields of a description.

        Raises:
            ValueError: one differs; both values are named.
        """
        for name, value in run.items():
            own = getattr(self, name)
            if own != value:
                at = f" ('{self.teacher}')" if name == "teacher_fingerprint" else ""
                raise ValueError(
                    f"teacher cache {folder} is of another {NAMES[name]}: it was made with {_short(own)}{at}, this run "
                    f"has {_short(value)}"
                )

    def write(self, folder: Path) -> None:
        """Put it into the folder."""
        with atomic_file(folder / MANIFEST) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CacheManifest:
        """What lies in a folder.

        Raises:
            ValueError: there is none, or it is of another version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no teacher cache (no {MANIFEST}): `kd-lightning cache` writes one")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version = found.get("version")
            known = {name.name for name in fields(cls)}
            if version == VERSION and known == found.keys():
                return cls(**found)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            version = "none"
        raise ValueError(f"{path} is no description of a teacher cache of version {VERSION}, got version {version}")


def _short(value: Any) -> str:
    """A digest is known by its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


# --------------------------------------------------------------------------------------------------------------- rows
def next_token_mask(labels: Tensor) -> Tensor:
    """Where the next token counts, [B, T − 1]."""
    return labels[:, 1:] != IGNORE_INDEX


def row_keys(batch: Mapping[str, Tensor]) -> Tensor:
    """Two numbers for each row, [B, 2], that change with any of its tokens and with which of them count.

    Padding changes nothing.
    """
    ids, mask, labels = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask", "labels"))
    keys = np.empty((len(ids), 2), dtype=np.int64)
    for n, there in enumerate(mask.astype(bool)):
        text = ids[n][there].astype(np.int32).tobytes() + (labels[n][there] != IGNORE_INDEX).tobytes()
        keys[n] = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.int64)
    return torch.from_numpy(keys)


class CacheReader:
    """The rows of a folder, read by memory mapping.

    Args:
        folder: with a description.
        digest: of the description that shards must be marked with.

    Raises:
        ValueError: a shard cannot be read, or is another cache's.
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
        """Number of each row, [B]; −1 where it is not here."""
        if not len(self.first):
            return torch.full((len(keys),), -1)
        at = torch.searchsorted(self.first, keys[:, 0].contiguous()).clamp_max(len(self.first) - 1)
        return torch.where((self.keys[at] == keys).all(1), at, -1)

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """What is kept of the tokens of these rows, one row after the other, by name."""
        spans = zip(*(x[rows].tolist() for x in (self.shards, self.starts, self.lengths)), strict=True)
        pieces = [{name: x[a : a + n] for name, x in self.tables[shard].items()} for shard, a, n in spans]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}

    @property
    def tokens(self) -> int:
        """Counted tokens kept."""
        return int(self.lengths.sum())


def _open(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            mark = (file.metadata() or {}).get("description")
            table = {name: file.get_tensor(name) for name in file.keys()}  # mapped: read when looked at
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if mark != digest or not {"keys", "lengths"} <= table.keys():
        raise ValueError(f"{path} belongs to another cache than {path.with_name(MANIFEST)} describes")
    return table


class CacheWriter:
    """Writes rows into new shards of a folder.

    Args:
        folder: with a description.
        digest: of the description.
        rank: of this process: several write at the same time.
        shard_bytes: from so many on a shard is full.
    """

    def __init__(self, folder: Path, digest: str, rank: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.digest, self.rank, self.shard_bytes = folder, digest, rank, shard_bytes
        self.parts: list[dict[str, Tensor]] = []
        self.bytes = 0

    def add(self, keys: Tensor, lengths: Tensor, tokens: Mapping[str, Tensor]) -> None:
        """Keep rows.

        Args:
            keys: [B, 2].
            lengths: counted tokens of each row, [B].
            tokens: by name, what is kept of them, [sum of lengths, …].
        """
        self.parts.append({"keys": keys, "lengths": lengths.int(), **tokens})
        self.bytes += sum(x.numel() * x.element_size() for x in tokens.values())
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is kept so far."""
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
    """Keep the teacher's head."""
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    with atomic_file(folder / HEAD) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)


def read_head(folder: Path) -> dict[str, Tensor]:
    """The teacher's head.

    Raises:
        ValueError: it is not there or cannot be read.
    """
    try:
        return load_file(folder / HEAD)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / HEAD} cannot be read: {str(error).splitlines()[0]}") from None


class DataDigest:
    """A digest of rows that does not depend on their order, and adds up over ranks."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.long)

    def add(self, keys: Tensor) -> None:
        """Count rows in."""
        self.sums += torch.cat([keys.sum(0), torch.tensor([len(keys)])])

    def __str__(self) -> str:
        a, b, count = self.sums.tolist()
        return f"{count} rows {(a % 2**64) ^ (b % 2**64):016x}"


def updated(description: CacheManifest, data: dict[str, str], tokens: int | None) -> CacheManifest:
    """The description once these splits are kept too."""
    return replace(description, data={**description.data, **data}, tokens=tokens)
