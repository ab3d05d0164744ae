"""The checks of `preflight`: each reads a run that has not started and yields what would waste it."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.callbacks.baselines import Baselines
from kd_lightning.callbacks.export import HFExport
from kd_lightning.callbacks.generation_eval import GenerationQuality
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.prepared_run import Level, Setup
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data.base import GenerationRow
from kd_lightning.data.chat_template import ChatTemplate
from kd_lightning.functional import entropy, forward_kl, log_softmax
from kd_lightning.losses import DistillationLoss
from kd_lightning.models.compatibility import check_model_fits_data
from kd_lightning.models.loading import auto, check_tokenizers, resolve_model
from kd_lightning.rollout.base import RolloutContext
from kd_lightning.training.evaluation import limited_batches

Check = Callable[[Setup], Iterator[tuple[Level, str]]]

MANY = 0.05  # share of rows from which on truncation is a warning and duplicates are an error
STEPS = 24  # at most, on one batch: Adam's first ones, each of the size of the rate, may raise a healthy run's loss
LOOKED_AT = 20  # rows that both chat templates write
SAME = 1e-4  # nats of forward KL: one model, in two precisions
NEARLY_UNIFORM = 0.98  # entropy of the softened teacher, as a share of log V
# The objective's gradient at this student as a share of that at the geometric middle between it and the teacher. Of the
# shipped configs: 0.93 to 1.65 from a supervised student; from random weights 1.0 to 1.8 with forward KL, TAID, AMiD
# and 0.06 to 0.13 with the skewed, JSD, reverse KL, α and α-β, whose gradient needs mass where the teacher has it.
LITTLE_GRADIENT = 0.25


def output(setup: Setup) -> Iterator[tuple[Level, str]]:
    """The folder can be written to, holds no finished run, and has room."""
    root = Path(setup.trainer.default_root_dir)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield "error", f"trainer.default_root_dir {root} cannot be written to: {there} is no folder that can be"
        return
    if there == root:
        setup.config["export"].check(root)
    size = sum(parameter.numel() * 4 for parameter in setup.model.student.parameters())
    kept = max(getattr(setup.config["checkpoint"], "save_top_k", 1), 0) + 2  # last, and the one being written
    needed, free = size * (3 * kept + 1), shutil.disk_usage(there).free
    if free < needed:
        yield (
            "error",
            f"{there} has {free / 1e9:.1f} GB free, and {kept} checkpoints and the export take {needed / 1e9:.1f} GB",
        )


def tokenizers(setup: Setup) -> Iterator[tuple[Level, str]]:
    """Teacher and student read the same tokens, the same end of turn and the same template."""
    teacher, tokenizer = setup.module.teacher, setup.datamodule.tokenizer
    if teacher is None or teacher.name is None:
        return
    check_tokenizers(teacher.name, tokenizer)
    place = resolve_model(teacher.name, "teacher")
    if Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").is_file():
        return
    try:
        theirs = auto.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except OSError:
        return  # a name on the hub without a tokenizer: the student's is taken on trust, as said above
    for name in ("eos_token", "bos_token", "pad_token"):
        one, other = getattr(theirs, name), getattr(tokenizer, name)
        if one != other and one is not None:
            level = "error" if name == "eos_token" else "warning"
            yield level, f"{name} is {one!r} to the teacher and {other!r} to the student"
    data = setup.datamodule
    talks = [talk for talk in data.conversations("train", LOOKED_AT) if talk.messages] if theirs.chat_template else []
    own, used = ChatTemplate(theirs, None, data.chat_template_kwargs), data.text_tokenizer.chat
    if any(own.written(talk) != used.written(talk) for talk in talks):
        yield "error", "the rows are written in another chat template than the teacher's own: it reads unknown forms"


def words(setup: Setup) -> Iterator[tuple[Level, str]]:
    """What is to be known of the rows beforehand does not wait for words that the run writes."""
    for callback in setup.trainer.callbacks:
        if isinstance(callback, Regeneration):
            callback.check(setup.module)
    return iter(())  # what is refused is the finding


def callbacks(setup: Setup) -> Iterator[tuple[Level, str]]:
    """What callbacks refuse before step 0, or at the first validation."""
    trainer, module, data = setup.trainer, setup.module, setup.datamodule
    for split, loader in (("val", data.val_dataloader), ("test", data.test_dataloader)):
        if data.sources[split]:
            limited_batches(loader(), getattr(trainer, f"limit_{split}_batches"))
    for callback in trainer.callbacks:
        if isinstance(callback, Baselines):
            callback.check(data, trainer.limit_val_batches)
        if isinstance(callback, GenerationQuality):
            callback.check(setup.model.student, data)
        if isinstance(callback, HFExport):
            callback.check_monitor(module)
    return iter(())


def places(setup: Setup) -> Iterator[tuple[Level, str]]:
    """Both models embed every token and have a place for the longest row."""
    teacher = setup.module.teacher
    for text in check_model_fits_data(setup.model.student, teacher and teacher.model, setup.datamodule):
        yield "warning", text


def rows(setup: Setup) -> Iterator[tuple[Level, str]]:
    """Rows that are cut, empty, doubled, or known from elsewhere."""
    data = setup.datamodule
    for split, counts in data.report.items():
        for name, what in (("truncated", "are cut at max_length"), ("cut_away", "have no answer within max_length")):
            if counts[name] > MANY * counts["rows"]:
                yield "warning", f"{split}: {counts[name]} of {counts['rows']} rows {what} {data.max_length}"
        for name, what in (("empty", "have no answer"), ("unlocated", "hide answers from the template")):
            if split == "train" and setup.words_come_later:
                continue
            if counts[name] > MANY * counts["rows"]:
                yield "warning", f"{split}: {counts[name]} of {counts['rows']} rows {what}"
    bundled = {split: any(name.startswith("asset:") for name in names) for split, names in data.sources.items()}
    for split in ("val", "test"):
        if bundled[split] and not bundled["train"]:
            yield (
                "warning",
                f"{split}: still the bundled rows, while train is not: name --data.{split}, or null for none",
            )
    digests = {split: _digests(data.generation_rows(split)) for split in data.report}
    train = set(digests["train"])
    twice = len(digests["train"]) - len(train)
    if twice > MANY * len(digests["train"]):
        yield "error", f"train: {twice} of {len(digests['train'])} rows repeat another one word for word"
    for split in digests.keys() - {"train"}:
        if known := len(train & set(digests[split])):
            yield "error", f"{split}: {known} rows are also in train: its figures would be memory"


def _digests(rows: list[GenerationRow]) -> list[bytes]:
    return [hashlib.sha256(f"{row['prompt']}\0{row['answer']}".encode()).digest() for row in rows]


def labels(setup: Setup) -> Iterator[tuple[Level, str]]:
    """Labels are the tokens in their place, inside both vocabularies, and an answer ends."""
    eos = setup.model.student.generation_config.eos_token_id
    eos = setup.datamodule.tokenizer.eos_token_id if eos is None else eos
    ends = set(eos) if isinstance(eos, list) else {eos}
    vocabulary = setup.model.student.get_output_embeddings().weight.shape[0]
    pad, ended, whole = setup.datamodule.pad_id, 0, 0
    for batch in setup.batches:
        ids, mask, wanted = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
        counted = wanted != IGNORE_INDEX
        if (wanted[counted] >= vocabulary).any():
            yield "error", f"label {int(wanted.max())} lies outside the student's vocabulary of {vocabulary}"
            return
        if (counted & ~mask).any() or (pad not in ends and (wanted == pad).any()):
            yield "error", f"padding is counted as a label (token {pad}): the student would learn to write it"
            return
        if (wanted != ids)[counted].any():
            yield "error", "labels are not the tokens in whose place they stand: a label belongs at its own token"
            return
        for row, tokens, there in zip(wanted, counted, mask, strict=True):
            if tokens.any() and int(there.sum()) < setup.datamodule.max_length:
                whole += 1
                ended += int(row[tokens][-1]) in ends
    if whole and ended < 0.5 * whole:
        yield (
            "error",
            f"{whole - ended} of {whole} answers do not end in what ends a generation ({sorted(ends)}): the student "
            "would never stop",
        )


def vocabulary(setup: Setup) -> Iterator[tuple[Level, str]]:
    """Neither model puts weight on ids that the tokenizer does not have."""
    known = len(setup.datamodule.tokenizer)
    for role, log_p in _log_probabilities(setup).items():
        mass = float(log_p[:, known:].exp().sum(-1).mean()) if log_p.shape[-1] > known else 0.0
        if mass > 0.01:
            text = f"puts {mass:.1%} of its probability on ids from {known} on, which the tokenizer does not have"
            yield "error" if role == "teacher" else "warning", f"the {role} {text}"


def _log_probabilities(setup: Setup) -> dict[str, Tensor]:
    """Log-probabilities of both models on the counted tokens of the first batch, [N, V]."""
    batch = setup.batches[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    index = (batch["labels"][:, 1:] != IGNORE_INDEX).reshape(-1).nonzero().squeeze(1)[:512]
    model, found = setup.model.student, {}
    model.eval()
    with torch.no_grad():
        logits = {"student": model(**inputs).logits}
        if setup.module.teacher is not None:
            logits["teacher"] = setup.module.teacher.logits(inputs)
    for role, values in logits.items():
        found[role] = log_softmax(values[:, :-1].reshape(-1, values.shape[-1])[index])
    model.train()
    return found


def teacher(setup: Setup) -> Iterator[tuple[Level, str]]:
    """The teacher knows this data better than the student, and better than chance."""
    if setup.module.teacher is None:
        return
    theirs, ours = setup.means["teacher_nll"], setup.means["student_nll"]
    level = "error" if setup.teacher_teaches else "warning"
    chance = math.log(len(setup.datamodule.tokenizer))
    if theirs >= 0.9 * chance:
        yield (
            level,
            f"its NLL on the held-out rows is {theirs:.2f}, about chance ({chance:.2f}): it knows nothing of them",
        )
    elif setup.means.get("forward_kl", math.inf) < SAME:
        yield level, "it and the student give the same probabilities: there is nothing to learn from it"
    elif theirs >= ours:
        yield level, f"its NLL on the held-out rows is {theirs:.2f}, no better than the student's {ours:.2f}"


def temperature(setup: Setup) -> Iterator[tuple[Level, str]]:
    """The softened teacher still says something."""
    if not setup.teacher_teaches:
        return
    t = setup.model.loss.token_loss.temperature
    log_p = log_softmax(_log_probabilities(setup)["teacher"] / t)
    share = float(entropy(log_p).mean()) / math.log(log_p.shape[-1])
    if share > NEARLY_UNIFORM:
        yield "error", f"at temperature {t:g} the teacher is all but uniform (entropy {share:.1%} of the largest)"


def objective(setup: Setup) -> Iterator[tuple[Level, str]]:
    """It is zero where the models agree, and it can move this student."""
    if not setup.teacher_teaches:
        return
    probabilities, loss = _log_probabilities(setup), setup.model.loss
    width = min(log_p.shape[-1] for log_p in probabilities.values())
    p, q = (probabilities[role][:, :width].unsqueeze(0) for role in ("teacher", "student"))
    counted = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    source = {"source": torch.zeros(1, dtype=torch.long, device=q.device)}
    alone = DistillationLoss(loss.objective, temperature=loss.token_loss.temperature, compile=False)

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        parts = alone.from_logits(student, teacher, counted, rows=source)
        return parts.loss / parts.divisor

    def gradient(student: Tensor) -> float:
        student = student.detach().clone().requires_grad_()
        torch.autograd.backward(mean(student, p))
        assert student.grad is not None
        return float(student.grad.norm())

    if float(forward_kl(p, q).mean()) < SAME:
        return  # `teacher` says it
    at_zero = float(mean(q, q))
    if abs(at_zero) > 1e-4:
        yield "error", f"it is {at_zero:.2g} where teacher and student agree, and a divergence is 0 there"
    share = gradient(q) / max(gradient((p + q) / 2), 1e-30)
    if share < LITTLE_GRADIENT:
        yield (
            "warning",
            f"its gradient at this student is {share:.1%} of that half way to the teacher: it hardly moves a student "
            "that puts no mass where the teacher does; start from supervised fine-tuning",
        )


def step(setup: Setup) -> Iterator[tuple[Level, str]]:
    """A few steps on one batch keep everything finite and lower its loss."""
    batch, model = setup.batches[0], setup.trainer.precision_plugin.convert_module(copy.deepcopy(setup.model))
    begin = time.perf_counter()
    if setup.module.responses is not None:
        batch = copy.deepcopy(setup.module.responses)(batch, RolloutContext(model, setup.module.teacher))
    writing = time.perf_counter() - begin
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = setup.module.optimizer_callable(parameters)
    ask, losses, seconds = None if setup.module.labels_only else setup.module.teacher, [], 0.0
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        with setup.trainer.precision_plugin.forward_context():
            parts = model(batch, ask)
        loss = parts.loss / parts.divisor.clamp_min(1)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, setup.trainer.gradient_clip_val or math.inf)
        if not (math.isfinite(losses[-1]) and torch.isfinite(norm)):
            yield "error", f"loss {losses[-1]:.4g}, gradient norm {float(norm):.4g} after {len(losses) - 1} steps"
            return
        if len(losses) > 4 and losses[-1] < losses[0]:
            break
        optimizer.step()
        seconds = time.perf_counter() - begin
    rate = optimizer.param_groups[0]["lr"]
    if not losses[-1] < losses[0]:
        text = f"{STEPS} steps on one batch at rate {rate:g} take its loss from {losses[0]:.3f} to {losses[-1]:.3f}"
        yield "error", f"{text}: it must fall"
    sizes = [p.numel() * p.element_size() for p in model.student.parameters()]
    state = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    size, total = f"student {sum(sizes) / 1e6:.1f} MB, optimizer {state / 1e6:.1f} MB", setup.trainer.max_steps
    if setup.module.responses is not None:
        size += f", {writing:.2f} s to draw a batch of responses"
        seconds += writing
    seconds *= setup.trainer.accumulate_grad_batches
    yield "note", f"memory and time: {size}, a step {seconds:.2f} s{_duration(setup, total, seconds)}"


def _duration(setup: Setup, steps: int, seconds: float) -> str:
    """How long so many steps take, and how often they pass over the rows."""
    if steps <= 0:
        return ""
    data = setup.datamodule
    known = data.report["train"]["rows"]
    batches = math.ceil(known / data.batch_size / setup.trainer.world_size)
    passes = steps * setup.trainer.accumulate_grad_batches / batches
    return f", {steps} steps about {steps * seconds / 60:.1f} min: {passes:.3g} passes over {known} rows"


CHECKS: tuple[Check, ...] = (output, tokenizers, words, callbacks, rows, places, labels, vocabulary)
CHECKS += (teacher, temperature, objective, step)
LAST = (places,)  # where these are refused, nothing after them can be looked at
