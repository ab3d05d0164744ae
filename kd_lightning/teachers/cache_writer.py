"""How what a teacher says gets onto the disk: once for every row, on any number of ranks, resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.console import progress_bar, progress_bar_enabled
from kd_lightning.distributed.collectives import sum_over_ranks
from kd_lightning.engine.top_k import top_k
from kd_lightning.teachers.cache_format import (
    DTYPES,
    KINDS,
    MANIFEST,
    SHARD_BYTES,
    CacheManifest,
    CacheReader,
    CacheWriter,
    DataDigest,
    next_token_mask,
    row_keys,
    updated,
    write_head,
)
from kd_lightning.teachers.cached import CachedTeacher, project_logits, tokenizer_digests

PROJECTED_ROWS = 512  # rows of logits alive at a time
ALIKE = ("teacher_fingerprint", "tokenizer", "template", "max_length", "kind", "k", "dtype", "vocabulary")


def fill_cache(
    folder: Path,
    module: Any,
    datamodule: Any,
    *,
    kind: str = "hidden",
    dtype: str | None = None,
    k: int = 64,
    shard_bytes: int = SHARD_BYTES,
    trainer: Any = None,
    bar: bool = True,
) -> CacheManifest:
    """Write down what a teacher says about every row of the data; what is there already is left as it is.

    Args:
        folder: new, or of the same teacher, tokenizer, template and length.
        module: its student and teacher are loaded.
        datamodule: its splits are loaded.
        kind: `hidden`: hidden states, exact for every loss; `top_k`: the k most probable tokens and the others' mass.
        dtype: `bfloat16` or `float32`; None: the teacher's own.
        k: tokens kept of each distribution, for `top_k`.
        shard_bytes: size of one file, and what a kill costs at most.
        trainer: of a run that has started: its ranks share the work; None: one process.
        bar: whether to show progress.

    Raises:
        ValueError: an argument is out of its range, or the folder is another cache's.
    """
    whose = _describe(module, datamodule, kind, dtype, k)
    total, rank = sum_over_ranks(trainer), 0 if trainer is None else trainer.global_rank
    head = module.teacher.head
    if (folder / MANIFEST).exists():
        kept = CacheManifest.read(folder)
        kept.check(folder, **{name: getattr(whose, name) for name in ALIKE})
        whose = dataclasses.replace(whose, data=kept.data, tokens=kept.tokens)
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "hidden":
            write_head(folder, head.weight, head.bias)
        whose.write(folder)
    total(torch.zeros(()))  # the others wait for the folder
    writer = CacheWriter(folder, whose.digest, rank, shard_bytes)
    data = {}
    for split in datamodule.splits:
        shards, digest = CacheReader(folder, whose.digest), DataDigest()  # a row may be in two splits
        for batch in progress_bar(datamodule.every_row(split), f"Teacher, {split}", shown=bar):
            _keep(module.teacher, batch, whose, shards, writer, digest, total)
        writer.flush()
        digest.sums = total(digest.sums)
        data[split] = str(digest)
    whose = updated(whose, data, CacheReader(folder, whose.digest).tokens)
    if rank == 0:
        whose.write(folder)
    total(torch.zeros(()))
    return whose


def cache_teacher(module: Any, trainer: Any) -> CachedTeacher:
    """The teacher of a run that has started, from then on read from `ROOT/teacher_cache`.

    Raises:
        ValueError: the data module cannot go through all of its rows, or the folder is another teacher's.
    """
    if isinstance(module.teacher, CachedTeacher):
        return module.teacher
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "every_row"):
        raise ValueError("teacher_cache needs a data module of this package, which can go through all of its rows")
    if datamodule.sources["test"] and trainer.limit_test_batches != 0:
        datamodule.setup("test")
    folder = Path(trainer.default_root_dir) / "teacher_cache"
    with trainer.precision_plugin.forward_context():
        fill_cache(folder, module, datamodule, trainer=trainer, bar=progress_bar_enabled(trainer))
    teacher = CachedTeacher(str(folder))
    teacher.load(module.device)
    return teacher


def _keep(
    teacher: Any,
    batch: dict[str, Tensor],
    whose: CacheManifest,
    shards: CacheReader,
    writer: CacheWriter,
    digest: DataDigest,
    total: Callable[[Tensor], Tensor],
) -> None:
    """Keep what is new in a batch. One new row lets the whole batch be computed: its last bits depend on it."""
    keys, lengths = row_keys(batch), next_token_mask(batch["labels"]).sum(1)
    digest.add(keys[lengths > 0])
    new = (lengths > 0) & (shards.find(keys) < 0)
    if not total(new.any().long()):  # ranks ask a sharded teacher together
        return
    tokens = _tokens(teacher, batch, whose)
    chosen = new.repeat_interleave(lengths)
    if new.any():
        writer.add(keys[new], lengths[new], {name: x[chosen] for name, x in tokens.items()})


@torch.no_grad()
def _tokens(teacher: Any, batch: dict[str, Tensor], whose: CacheManifest) -> dict[str, Tensor]:
    """What is kept of the counted tokens of a batch, by name, on the CPU."""
    head, mask = teacher.head, next_token_mask(batch["labels"])
    device = torch.device("cpu") if head is None else head.weight.device
    moved = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
    where = mask.to(device)
    said = (teacher.logits(moved) if head is None else teacher.hidden(moved))[:, :-1][where]
    if whose.kind == "hidden":
        return {"hidden": said.to(DTYPES[whose.dtype]).cpu()}
    labels = moved["labels"][:, 1:][where]
    found = []
    for rows, wanted in zip(torch.split(said, PROJECTED_ROWS), torch.split(labels, PROJECTED_ROWS), strict=True):
        logits = rows if head is None else project_logits(head, rows)
        found.append(top_k(logits[:, : whose.vocabulary], wanted, whose.k or 1))
    return {
        "ids": torch.cat([x.ids for x in found]).int().cpu(),
        "log_probs": torch.cat([x.log_probs for x in found]).to(DTYPES[whose.dtype]).cpu(),
        "log_tail": torch.cat([x.log_tail for x in found]).cpu(),
    }


def _describe(module: Any, datamodule: Any, kind: str, dtype: str | None, k: int) -> CacheManifest:
    """Whose words are kept how."""
    teacher, head = module.teacher, module.teacher.head
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    if head is None and kind == "hidden":
        raise ValueError(f"teacher '{teacher.name}' has no cut between body and head: keep its --kind top_k")
    own = torch.float32 if head is None else head.weight.dtype
    dtype = ("bfloat16" if own == torch.bfloat16 else "float32") if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    student = int(module.student.get_output_embeddings().weight.shape[0])
    vocabulary = student if head is None else len(head.weight)
    if kind == "top_k":
        vocabulary = min(vocabulary, student)
        if not 1 <= k < vocabulary:
            raise ValueError(f"k must lie in [1, {vocabulary - 1}], as there are {vocabulary} tokens, got {k}")
    return CacheManifest(
        teacher=teacher.name or type(teacher).__name__,
        teacher_fingerprint=teacher.fingerprint(),
        **tokenizer_digests(datamodule),
        kind=kind,
        dtype=dtype,
        k=k if kind == "top_k" else None,
        vocabulary=vocabulary,
        scale=1.0 if head is None else head.scale,
        softcap=None if head is None else head.softcap,
    )
