"""Checks of `preflight` on folder, tokenizers, rows, callbacks and labels: each yields what would waste the run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kd_lightning.callbacks.base import ChecksBeforeStart
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.prepared_run import Findings, Level, PreparedFit
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data.base import GenerationRow
from kd_lightning.data.chat_template import ChatTemplate
from kd_lightning.data.row_report import extra_notes
from kd_lightning.data.text.prompt_notice import prompt_notice
from kd_lightning.distributed.checksum import check_checksums
from kd_lightning.distributed.trainer import limit_batches
from kd_lightning.folder_lock import lock_problem
from kd_lightning.models.compatibility import check_model_fits_data
from kd_lightning.models.hf_adapter import base_model, eos_token_ids
from kd_lightning.models.loading import check_tokenizers, resolve_model
from kd_lightning.models.pretrained import from_pretrained
from kd_lightning.training.evaluation import limited_batches

Check = Callable[[PreparedFit], Findings]

MANY = 0.05  # share of rows above which truncation is a warning and duplicates are an error
COMPARED = 20  # rows that are rendered with both chat templates


def check_output(fit: PreparedFit) -> Findings:
    """The folder is writable, holds no finished run and has free space; a checkpoint to resume is not damaged."""
    root = Path(fit.trainer.default_root_dir)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield "error", f"trainer.default_root_dir {root} cannot be written to: {there} is not a writable folder"
        return
    checkpoints = fit.config.checkpoint.dirpath
    for folder in (root, *([] if checkpoints is None else [Path(checkpoints)])):
        if problem := lock_problem(folder):
            yield "error", problem
    resumed = fit.config.ckpt_path
    if there == root:
        fit.config.export.check(root, resuming=bool(resumed))
    if resumed:
        check_checksums(Path(resumed))
    size = sum(parameter.numel() * 4 for parameter in fit.student.parameters())
    kept = max(fit.config.checkpoint.save_top_k, 0) + 2  # `last`, and the one that is being written
    needed, free = size * (3 * kept + 1), shutil.disk_usage(there).free
    if free < needed:
        yield (
            "error",
            f"{there} has {free / 1e9:.1f} GB free, but {kept} checkpoints and the export take {needed / 1e9:.1f} GB: "
            "free some space, or choose another --trainer.default_root_dir",
        )


def check_teacher_tokenizer(fit: PreparedFit) -> Findings:
    """Teacher and student have the same tokens, the same special tokens and the same chat template."""
    teacher, tokenizer = fit.module.teacher, fit.datamodule.tokenizer
    if teacher is None or teacher.name is None:
        return
    check_tokenizers(teacher.name, tokenizer)
    path = resolve_model(teacher.name, "teacher")
    if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
        return
    try:
        theirs = from_pretrained("tokenizer", path)
    except OSError:
        return  # a hub name without a tokenizer; `check_tokenizers` has logged that it is not checked
    special = {
        "eos_token": (theirs.eos_token, tokenizer.eos_token),
        "bos_token": (theirs.bos_token, tokenizer.bos_token),
        "pad_token": (theirs.pad_token, tokenizer.pad_token),
    }
    for name, (one, other) in special.items():
        if one != other and one is not None:
            level: Level = "error" if name == "eos_token" else "warning"
            yield level, f"{name} is {one!r} for the teacher and {other!r} for the student: use the same token for both"
    data = fit.datamodule
    chats = [chat for chat in data.conversations("train", COMPARED) if chat.messages] if theirs.chat_template else []
    used = data.text_tokenizer.chat
    own = ChatTemplate(theirs, None, data.chat_template_kwargs, now=used.now)
    if any(own.full_text(chat) != used.full_text(chat) for chat in chats):
        yield (
            "error",
            "the rows are rendered with another chat template than the teacher's: it reads an unknown format; set "
            "data.chat_template to the teacher's template",
        )


def check_responses(fit: PreparedFit) -> Findings:
    """Nothing has to be known in advance of responses that are generated during the run."""
    for regeneration in fit.regenerations:
        regeneration.check_before_start(fit)
    return iter(())  # a refusal is the finding


def check_callbacks(fit: PreparedFit) -> Findings:
    """What the callbacks would refuse before step 0, or at the first validation."""
    data = fit.datamodule
    for split, loader in (("val", data.val_dataloader), ("test", data.test_dataloader)):
        if data.sources[split]:
            limited_batches(loader(), limit_batches(fit.trainer, split))
    for callback in fit.callbacks:
        if isinstance(callback, Regeneration):
            continue  # `check_responses` has checked it
        if isinstance(callback, ChecksBeforeStart):
            callback.check_before_start(fit)
    return iter(())


def check_optimizer(fit: PreparedFit) -> Findings:
    """Optimizer and scheduler accept their arguments."""
    fit.module.check_optimizer()
    return iter(())  # a refusal is the finding


def check_positions(fit: PreparedFit) -> Findings:
    """Both models have an embedding for every token, and enough positions for the longest row."""
    teacher = fit.module.teacher
    for text in check_model_fits_data(fit.student, None if teacher is None else teacher.model, fit.datamodule):
        yield "warning", text


def check_rows(fit: PreparedFit) -> Findings:
    """Rows are complete, have answers, and are neither repeated nor shared between the splits."""
    yield from _row_counts(fit)
    data = fit.datamodule
    bundled = {split: any(name.startswith("asset:") for name in names) for split, names in data.sources.items()}
    for split in ("val", "test"):
        if bundled[split] and not bundled["train"]:
            yield (
                "warning",
                f"{split}: still the bundled rows, while train is not: set --data.{split}, or null for none",
            )
    hashes = {split: _hashes(data.generation_rows(split)) for split in data.report}
    train = set(hashes["train"])
    repeated = len(hashes["train"]) - len(train)
    if repeated > MANY * len(hashes["train"]):
        yield "error", f"train: {repeated} of {len(hashes['train'])} rows repeat another row exactly: remove them"
    for split in hashes.keys() - {"train"}:
        if known := len(train & set(hashes[split])):
            yield "error", f"{split}: {known} rows are also in train: metrics on them would measure memorization"


def _row_counts(fit: PreparedFit) -> Findings:
    """Splits of which many rows are truncated or have no answer."""
    data = fit.datamodule
    for split, counts in data.report.items():
        problems = {
            "truncated": f"are truncated at max_length {data.max_length}: raise data.max_length",
            "cut_away": f"have no answer within max_length {data.max_length}: raise data.max_length",
        }
        if split != "train" or not fit.generates_responses:
            problems["empty"] = "have no answer"
            problems["unlocated"] = "have answers that cannot be located in the text that the chat template renders"
        for name, problem in problems.items():
            if counts[name] > MANY * counts["rows"]:
                yield "warning", f"{split}: {counts[name]} of {counts['rows']} rows {problem}"
        for note in extra_notes(counts):
            yield "warning", f"{split}: {note}"


def _hashes(rows: list[GenerationRow]) -> list[bytes]:
    return [hashlib.sha256(f"{row['prompt']}\0{row['answer']}".encode()).digest() for row in rows]


def check_prompts(fit: PreparedFit) -> Findings:
    """The generation prompt is what stands before the answers in training."""
    data = fit.datamodule
    if notice := prompt_notice(data.text_tokenizer, data.conversations("train", COMPARED)):
        yield "warning", notice


def check_labels(fit: PreparedFit) -> Findings:
    """Each label is the token at its position and inside the vocabulary, and answers end."""
    data = fit.datamodule
    ends = set(eos_token_ids(base_model(fit.student))) or {data.tokenizer.eos_token_id}
    ended, complete = 0, 0
    for batch in fit.batches:
        ids, mask, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
        labeled = labels != IGNORE_INDEX
        if (labels[labeled] >= fit.model.vocabulary).any():
            yield (
                "error",
                f"label {int(labels.max())} is outside the student's vocabulary of {fit.model.vocabulary}: use its own "
                "tokenizer",
            )
            return
        if (labeled & ~mask).any() or (data.pad_id not in ends and (labels == data.pad_id).any()):
            yield "error", f"padding has labels (token {data.pad_id}): the student would learn to generate padding"
            return
        if (labels != ids)[labeled].any():
            yield "error", "labels differ from the tokens at their positions: do not shift them, the module does"
            return
        for row, tokens, there in zip(labels, labeled, mask, strict=True):
            if tokens.any() and int(there.sum()) < data.max_length:
                complete += 1
                ended += int(row[tokens][-1]) in ends
    if complete and ended < 0.5 * complete:
        yield (
            "error",
            f"{complete - ended} of {complete} answers do not end with an end-of-sequence token ({sorted(ends)}): the "
            "student would not learn to stop; check data.chat_template and the student's generation_config.json",
        )


DATA_CHECKS: dict[str, Check] = {
    "output": check_output,
    "tokenizers": check_teacher_tokenizer,
    "words": check_responses,
    "callbacks": check_callbacks,
    "optimizer": check_optimizer,
    "rows": check_rows,
    "prompts": check_prompts,
    "places": check_positions,
    "labels": check_labels,
}
