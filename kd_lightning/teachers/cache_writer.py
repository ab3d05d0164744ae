"""Write a teacher's outputs to disk, once for every row, on any number of ranks, resumable."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.console import progress_bar
from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS
from kd_lightning.distributed.signals import StopRequest, finish_on_signal, stop
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.top_k import TopK, top_k
from kd_lightning.folder_lock import folder_lock, remove_leftovers
from kd_lightning.teachers.base import Teacher, TokenizedData
from kd_lightning.teachers.batches import teacher_batch
from kd_lightning.teachers.cache_format import (
    DTYPES,
    KINDS,
    MANIFEST,
    SHARD_BYTES,
    CacheManifest,
    CacheReader,
    CacheWriter,
    DataDigest,
    row_keys,
    updated,
    write_head,
)
from kd_lightning.teachers.cached import CachedTeacher, tokenizer_digests
from kd_lightning.teachers.server_answers import read_ahead

LOGIT_ROWS = 512  # tokens whose logits are in memory at a time
SAME_FIELDS = ("teacher_fingerprint", "tokenizer", "template", "max_length", "kind", "k", "dtype", "vocabulary")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that write a cache together.

    Args:
        rank: this process.
        sum_over_ranks: sums a tensor over all of them; every rank must call it.
    """

    rank: int = 0
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x

    def wait(self) -> None:
        """Return when every rank has come this far."""
        self.sum_over_ranks(torch.zeros(()))


def fill_cache(
    folder: Path,
    teacher: Teacher,
    data: TokenizedData,
    student_vocabulary: int,
    *,
    kind: str = "hidden",
    dtype: str | None = None,
    k: int = 64,
    shard_bytes: int = SHARD_BYTES,
    ranks: Ranks | None = None,
    bar: bool = True,
) -> CacheManifest:
    """Write a teacher's outputs for every row of the data; rows that are cached already are left as they are.

    The folder is locked meanwhile. After Ctrl-C and SIGTERM the present batch is finished and written.

    Args:
        folder: new, or a cache of the same teacher, tokenizer, template and length.
        teacher: loaded.
        data: with its splits loaded.
        student_vocabulary: number of logits of the student.
        kind: `hidden`: hidden states, exact for every loss; `top_k`: the k most probable tokens and the mass of all
            others.
        dtype: `bfloat16` or `float32`; None: the teacher's own.
        k: tokens stored of each distribution, for `top_k`.
        shard_bytes: size of one file, and the work lost if interrupted.
        ranks: the processes that share the work; None: this one alone.
        bar: whether to show progress.

    Raises:
        ValueError: an argument is out of its range, another process writes to the folder, or it is another cache's.
        KeyboardInterrupt: Ctrl-C was pressed on any rank; raised on every rank.
        Terminated: the same after SIGTERM.
    """
    ranks = ranks or Ranks()
    with _locked(folder, ranks), finish_on_signal(f"interrupted: finishing this batch of {folder}") as request:
        return _fill(folder, teacher, data, student_vocabulary, (kind, dtype, k), shard_bytes, ranks, bar, request)


@contextmanager
def _locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Rank 0 holds the lock of the folder, and has removed what killed runs left half-written in it.

    Raises:
        ValueError: on every rank: another process holds the lock.
    """
    problem: ValueError | OSError | None = None
    with ExitStack() as lock:
        if ranks.rank == 0:
            try:
                lock.enter_context(folder_lock(folder, rank_zero_info))
                remove_leftovers([folder])
            except (ValueError, OSError) as error:
                problem = error
        if ranks.sum_over_ranks(torch.tensor(float(problem is not None))):
            raise problem or ValueError(f"{folder} cannot be written to: see the error of rank 0")
        yield


def _fill(
    folder: Path,
    teacher: Teacher,
    data: TokenizedData,
    student_vocabulary: int,
    stored: tuple[str, str | None, int],
    shard_bytes: int,
    ranks: Ranks,
    bar: bool,
    request: StopRequest,
) -> CacheManifest:
    kind, dtype, k = stored
    head = teacher.head  # all ranks ask together: it may be sharded
    manifest = _manifest(teacher, head, data, student_vocabulary, kind, dtype, k)
    if (folder / MANIFEST).exists():
        there = CacheManifest.read(folder)
        there.check(folder, **{name: getattr(manifest, name) for name in SAME_FIELDS})
        manifest = dataclasses.replace(manifest, data=there.data, tokens=there.tokens)
    elif ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "hidden" and head is not None:
            write_head(folder, head.weight, head.bias)
        manifest.write(folder)
    ranks.wait()  # until the folder is there
    writer = CacheWriter(folder, manifest.digest, ranks.rank, shard_bytes)
    found = {}
    for split in data.splits:
        reader, digest = CacheReader(folder, manifest.digest), DataDigest()  # a row may be in two splits
        batches = data.every_row(split)
        total = len(batches) if isinstance(batches, Sized) else None
        ahead = read_ahead(map(teacher_batch, batches), functools.partial(_prefetch_new, teacher, reader))
        try:
            for batch in progress_bar(ahead, f"Teacher, {split}", total, shown=bar):
                _add_new_rows(teacher, batch, manifest, reader, writer, digest, ranks, request)
        finally:  # what a server has answered is not asked for again
            writer.flush()
        digest.sums = ranks.sum_over_ranks(digest.sums)
        found[split] = str(digest)
    manifest = updated(manifest, found, CacheReader(folder, manifest.digest).tokens)
    if ranks.rank == 0:
        manifest.write(folder)
    ranks.wait()
    return manifest


def _prefetch_new(teacher: Teacher, reader: CacheReader, batch: Mapping[str, Tensor]) -> None:
    teacher.prefetch(_without_cached(batch, reader.find(row_keys(batch)) >= 0))


def _without_cached(batch: Mapping[str, Tensor], cached: Tensor) -> dict[str, Tensor]:
    """The batch, in which rows that are cached have no labels, [B]."""
    labels = batch["labels"].masked_fill(cached.unsqueeze(1), IGNORE_INDEX)
    own = {name: labels for name in ("labels", TEACHER_FIELDS["labels"]) if name in batch}
    return {**batch, **own}


def cache_teacher(
    folder: Path,
    teacher: Teacher,
    data: TokenizedData,
    student_vocabulary: int,
    device: torch.device,
    ranks: Ranks,
    bar: bool = True,
) -> CachedTeacher:
    """The same teacher, read from a cache that is written now.

    Args:
        folder: of the cache.
        teacher: on its device.
        data: with its splits loaded.
        student_vocabulary: number of logits of the student.
        device: of the run.
        ranks: the processes that share the work.
        bar: whether to show progress.

    Raises:
        ValueError: the folder is another teacher's cache.
    """
    if isinstance(teacher, CachedTeacher):
        return teacher
    fill_cache(folder, teacher, data, student_vocabulary, ranks=ranks, bar=bar)
    cached = CachedTeacher(str(folder))
    cached.load(device)
    return cached


def _add_new_rows(
    teacher: Teacher,
    batch: Mapping[str, Tensor],
    manifest: CacheManifest,
    reader: CacheReader,
    writer: CacheWriter,
    digest: DataDigest,
    ranks: Ranks,
    request: StopRequest,
) -> None:
    """Add the new rows of a batch. If one is new, the whole batch is read: the last bits depend on all of it."""
    keys, lengths = row_keys(batch), next_token_mask(batch["labels"]).sum(1)
    digest.add(keys[lengths > 0])
    new = (lengths > 0) & (reader.find(keys) < 0)
    some_new, stopped = ranks.sum_over_ranks(torch.tensor([int(new.any()), int(request.signal > 0)])).tolist()
    if stopped:
        writer.flush()
        raise stop(request.signal or signal.SIGTERM)
    if not some_new:  # a sharded teacher runs on all ranks together
        return
    tokens = _outputs(teacher, batch, manifest, new)
    if new.any():
        writer.add(keys[new], lengths[new], tokens)


@torch.no_grad()
def _outputs(teacher: Teacher, batch: Mapping[str, Tensor], manifest: CacheManifest, new: Tensor) -> dict[str, Tensor]:
    """The teacher's outputs at labeled tokens of these rows of a batch, by name, on the CPU."""
    head = teacher.head
    if head is None:
        return _labeled_outputs(teacher, head, _without_cached(batch, ~new), manifest)
    # the last bits of its product depend on which tokens it is applied to: on those of every row
    chosen = new.repeat_interleave(next_token_mask(batch["labels"]).sum(1))
    return {name: x[chosen] for name, x in _labeled_outputs(teacher, head, batch, manifest).items()}


def _labeled_outputs(
    teacher: Teacher, head: Head | None, batch: Mapping[str, Tensor], manifest: CacheManifest
) -> dict[str, Tensor]:
    mask = next_token_mask(batch["labels"])
    device = torch.device("cpu") if head is None else head.weight.device
    moved = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
    where = mask.to(device)
    output = teacher.logits(moved) if head is None else teacher.hidden(moved)
    output = output[:, :-1][where]
    if isinstance(output, TopK):
        return _stored(output, manifest)
    if manifest.kind == "hidden":
        return {"hidden": output.to(DTYPES[manifest.dtype]).cpu()}
    labels = moved["labels"][:, 1:][where]
    found = []
    for rows, wanted in zip(torch.split(output, LOGIT_ROWS), torch.split(labels, LOGIT_ROWS), strict=True):
        logits = rows if head is None else head.logits(rows)
        found.append(top_k(logits[:, : manifest.vocabulary], wanted, manifest.k or 1))
    columns = zip(*((x.ids, x.log_probs, x.log_tail) for x in found), strict=True)
    ids, log_probs, log_tail = (torch.cat(parts) for parts in columns)
    return _stored(TopK(ids, log_probs, log_tail, manifest.vocabulary), manifest)


def _stored(known: TopK, manifest: CacheManifest) -> dict[str, Tensor]:
    """The top k of a teacher that knows no more, as they are cached.

    Raises:
        ValueError: another number of tokens is to be cached.
    """
    given = known.ids.shape[-1]
    if given != manifest.k:
        raise ValueError(f"k must be {given}, the number of tokens that the teacher gives, got {manifest.k}")
    return {
        "ids": known.ids.int().cpu(),
        "log_probs": known.log_probs.to(DTYPES[manifest.dtype]).cpu(),
        "log_tail": known.log_tail.cpu(),
    }


def _manifest(
    teacher: Teacher,
    head: Head | None,
    data: TokenizedData,
    student_vocabulary: int,
    kind: str,
    dtype: str | None,
    k: int,
) -> CacheManifest:
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    if head is None and kind == "hidden":
        name = teacher.name or type(teacher).__name__
        raise ValueError(f"teacher '{name}' cannot be split into body and head: pass --kind top_k")
    own = torch.float32 if head is None else head.weight.dtype
    dtype = ("bfloat16" if own == torch.bfloat16 else "float32") if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    vocabulary = student_vocabulary if head is None else len(head.weight)
    if kind == "top_k":
        shared = data.vocabulary_map
        vocabulary = min(vocabulary, student_vocabulary) if shared is None else shared.teacher_size
        if not 1 <= k < vocabulary:
            raise ValueError(f"k must lie in [1, {vocabulary - 1}], as there are {vocabulary} tokens, got {k}")
    return CacheManifest(
        teacher=teacher.name or type(teacher).__name__,
        teacher_fingerprint=teacher.fingerprint(),
        **tokenizer_digests(data),
        kind=kind,
        dtype=dtype,
        k=k if kind == "top_k" else None,
        vocabulary=vocabulary,
        scale=1.0 if head is None else head.scale,
        softcap=None if head is None else head.softcap,
    )
