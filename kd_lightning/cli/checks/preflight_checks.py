"""Checks of `preflight` on folder, tokenizers, rows, callbacks and labels: each yields what would waste the run."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from kd_lightning.callbacks.base import ChecksBeforeStart
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.checks.boundaries import shown_boundaries
from kd_lightning.cli.prepared_run import Findings, Level, PreparedFit
from kd_lightning.constants import IGNORE_INDEX, TEACHER_INDEX
from kd_lightning.data.alignment.two_tokenizers import TwoTokenizers
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.data.chat_template import ChatTemplate
from kd_lightning.data.files.text_files import TEXT
from kd_lightning.data.row_report import PLAIN_COUNTS, extra_notes
from kd_lightning.data.text.prompt_notice import prompt_notice
from kd_lightning.distributed.checksum import check_checksums
from kd_lightning.distributed.trainer import limit_batches
from kd_lightning.folder_lock import lock_problem
from kd_lightning.models.compatibility import check_models_fit_data
from kd_lightning.models.hf_adapter import base_model, eos_token_ids
from kd_lightning.models.loading import check_tokenizers, resolve_model
from kd_lightning.models.pretrained import from_pretrained
from kd_lightning.teachers.batches import member_names, models_of_run
from kd_lightning.training.evaluation import limited_batches
from kd_lightning.training.teacher_setup import alignment_notices, check_teacher_tokenizers

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
    state = fit.module.teacher_state  # an average of the student
    average = 0 if state is None else sum(x.numel() * x.element_size() for x in state.parameters())
    kept = max(fit.config.checkpoint.save_top_k, 0) + 2  # `last`, and the one that is being written
    needed, free = size * (3 * kept + 1) + average * kept, shutil.disk_usage(there).free
    if free < needed:
        yield (
            "error",
            f"{there} has {free / 1e9:.1f} GB free, but {kept} checkpoints and the export take {needed / 1e9:.1f} GB: "
            "free some space, or choose another --trainer.default_root_dir",
        )


def check_teacher_tokenizer(fit: PreparedFit) -> Findings:
    """Teacher and student have the same tokens, the same special tokens and the same chat template."""
    if fit.datamodule.has_two_tokenizers:
        yield from _show_two_tokenizers(fit)
    members = {} if fit.module.teacher is None else fit.module.teacher.members
    same = {name: fit.datamodule.for_member(name) for name in members}
    same = {name: own for name, own in same.items() if not own.has_two_tokenizers}
    found = {str(members[name].name): own for name, own in same.items() if members[name].name is not None}
    for name, own in found.items():
        yield from _compare_tokenizers(fit, name, own)


def _show_two_tokenizers(fit: PreparedFit) -> Findings:
    """What two tokenizers share, and an answer in the tokens of both."""
    data, teacher = fit.datamodule, fit.module.teacher
    check_teacher_tokenizers(teacher, data)
    for text, few in alignment_notices(data, teacher):
        yield "warning" if few else "note", text
    batch = fit.batches[0]
    for share in () if teacher is None else teacher.shares(batch):
        own = data.for_member(share.member)
        if own.has_two_tokenizers and (boundaries := shown_boundaries(share.rows_of(batch), own)):
            yield "note", boundaries


def _compare_tokenizers(fit: PreparedFit, teacher: str, rows: TwoTokenizers) -> Findings:
    """The same for the teacher of this name, and the rows as it reads them."""
    tokenizer = fit.datamodule.tokenizer
    check_tokenizers(teacher, tokenizer)
    path = resolve_model(teacher, "teacher")
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
    text = rows.teacher_text_tokenizer
    used = text.chat
    own = ChatTemplate(theirs, None, text.template_kwargs, now=used.now)
    if any(own.full_text(chat) != used.full_text(chat) for chat in chats):
        yield (
            "error",
            "the rows are rendered with another chat template than the teacher's: it reads an unknown format; set "
            "data.chat_template (or data.teacher_chat_template) to the teacher's template",
        )


def check_responses(fit: PreparedFit) -> Findings:
    """Nothing has to be known in advance of responses that are generated during the run."""
    for regeneration in fit.regenerations:
        regeneration.check_before_start(fit)
    source = fit.module.responses
    if source is not None and source.served is not None and source.sampling is not None:
        source.served.start(fit.student, fit.datamodule, source.sampling, None)
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


def check_routing(fit: PreparedFit) -> Findings:
    """Every row can be taught, and every teacher has rows."""
    teacher = fit.module.teacher
    if teacher is None:
        return
    teacher.check_data(fit.datamodule)
    names = member_names(teacher)
    used = set(fit.datamodule.index_column(TEACHER_INDEX, "train").values()) if names else set()
    for number, name in enumerate(names):
        if number not in used:
            yield "warning", f"no row of train names teacher {name!r}: remove it from model.teacher.teachers"


def check_schedule(fit: PreparedFit) -> Findings:
    """Schedule and validation fit the run's length, and callbacks watch metrics that are logged."""
    for text in fit.module.check_run(fit.trainer, fit.datamodule):
        yield "warning", text


def check_optimizer(fit: PreparedFit) -> Findings:
    """Optimizer and scheduler accept their arguments."""
    fit.module.check_optimizer()
    return iter(())  # a refusal is the finding


def check_positions(fit: PreparedFit) -> Findings:
    """Both models have an embedding for every token, and enough positions for the longest row."""
    for text in check_models_fit_data(models_of_run(fit.student, fit.module.teacher), fit.datamodule):
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
    hashes = {split: _hashes(data, split) for split in data.report}
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
        for note in extra_notes({name: count for name, count in counts.items() if name not in PLAIN_COUNTS}):
            yield "warning", f"{split}: {note}"


def _hashes(data: DistillationDataModule, split: str) -> list[bytes]:
    """Of each row: the prompts of both models, and the answer; of documents, the text of each window."""
    if split in data.document_splits:
        return [hashlib.sha256(text.encode()).digest() for text in data.row_fields(split, TEXT).values()]
    rows = data.generation_rows(split)
    theirs = data.generation_rows(split, role="teacher") if data.teacher_has_own_input else rows
    texts = (f"{row['prompt']}\0{own['prompt']}\0{row['answer']}" for row, own in zip(rows, theirs, strict=True))
    return [hashlib.sha256(text.encode()).digest() for text in texts]


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
    are_cut = data.has_two_tokenizers and bool(data.document_splits)  # then shorter rows may be parts of a document
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
            if tokens.any() and int(there.sum()) < data.max_length and not are_cut:
                complete += 1
                ended += int(row[tokens][-1]) in ends
    if complete and ended < 0.5 * complete:
        yield (
            "error",
            f"{complete - ended} of {complete} answers do not end with an end-of-sequence token ({sorted(ends)}): the "
            "student would not learn to stop; check data.chat_template and the student's generation_config.json",
        )


def check_teacher_input(fit: PreparedFit) -> Findings:
    """Both prompts of the first row whose prompts differ, if the teacher has an input of its own, and what differs."""
    data = fit.datamodule
    if not data.teacher_has_own_input:
        return
    if fit.module.teacher is None:
        yield "error", "data.teacher_prompt and data.teacher_chat_template need a teacher, and model.teacher is null"
        return
    rows = zip(*(data.generation_rows("train", COMPARED, role) for role in ("student", "teacher")), strict=True)
    pairs = [(student["prompt"], teacher["prompt"]) for student, teacher in rows]
    if not pairs:  # documents
        return
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if not differing:
        yield "note", f"the teacher reads the same prompts as the student in the first {len(pairs)} rows"
        return
    words = [re.findall(r"\s*\S+", text) for text in differing[0]]
    parts = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes()
    changes = [(words[0][a:b], words[1][c:d]) for kind, a, b, c, d in parts if kind != "equal"]
    only = ["".join(itertools.chain.from_iterable(one)) for one in zip(*changes, strict=True)]
    yield (
        "note",
        f"the student reads {differing[0][0]!r}, the teacher {differing[0][1]!r}; only the student reads {only[0]!r}, "
        f"only the teacher {only[1]!r}",
    )


DATA_CHECKS: dict[str, Check] = {
    "output": check_output,
    "routing": check_routing,
    "tokenizers": check_teacher_tokenizer,
    "words": check_responses,
    "callbacks": check_callbacks,
    "optimizer": check_optimizer,
    "schedule": check_schedule,
    "rows": check_rows,
    "prompts": check_prompts,
    "places": check_positions,
    "labels": check_labels,
    "teacher_input": check_teacher_input,
}
