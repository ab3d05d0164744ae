"""Several teachers, each with its own tokenizer: the rows each reads, the sum of the single steps, runs, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import processes
import runs
from architectures import tiny
from kd_lightning import (
    AdaptiveKL,
    CachedTeacher,
    ChunkLikelihood,
    ContrastiveDataModule,
    DistillationModule,
    ForwardKL,
    GeneralizedJSD,
    HFTeacher,
    InstructionDataModule,
    OnPolicy,
    RoutedTeacher,
    SelfTeacher,
    WeightedSum,
)
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS, TEACHER_INDEX, TEACHER_POSITIONS
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.training.teacher_setup import use_two_tokenizers
from pair_data import pairs
from sharded_fits import joined, strategies
from tiny_fits import SGD, STILL, Batch, Run, assert_same_student, fit_data

OTHER, SAME = "other", "same"
"""The teacher with another tokenizer, and the one with the student's."""
SIZES = {"asset:student": 2048, "asset:student_byte_fallback": 1024}
ELSEWHERE = {"asset:student": "asset:student_byte_fallback", "asset:student_byte_fallback": "asset:teacher"}
BYTES = "asset:student_byte_fallback"


def named_rows(folder: Path, names: tuple[str, ...] = (OTHER, SAME, SAME, OTHER, SAME), count: int = 12) -> str:
    """Rows of the bundled data that name their teachers."""
    path = folder / f"{'_'.join(dict.fromkeys(names))}.jsonl"
    lines = Path(resolve("asset:validation")).read_text(encoding="utf-8").splitlines()[:count]
    rows = [{**json.loads(line), "teacher_id": names[n % len(names)]} for n, line in enumerate(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path: str, name: str) -> str:
    """The rows that name one teacher, in a file of their own."""
    found = [
        line for line in Path(path).read_text(encoding="utf-8").splitlines() if json.loads(line)["teacher_id"] == name
    ]
    own = Path(path).with_name(f"{name}.jsonl")
    own.write_text("\n".join(found) + "\n", encoding="utf-8")
    return str(own)


def data(path: str, student: str = BYTES, kind: Any = InstructionDataModule, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"tokenizer": student, "batch_size": 12, "max_length": 64, "shuffle": False}
    return kind(path, **{**settings, **kwargs})


def plain_teacher(student: str = BYTES) -> Any:
    """A teacher that reads the student's tokens, of another width; a loaded model without a name."""
    torch.manual_seed(5)
    return tiny("llama", hidden_size=48, vocab_size=SIZES[student] + 8)


def other_teacher(student: str = BYTES) -> HFTeacher:
    return HFTeacher(ELSEWHERE[student], {"dtype": "float32"})


def teachers(student: str = BYTES, **more: Any) -> RoutedTeacher:
    return RoutedTeacher({OTHER: other_teacher(student), SAME: plain_teacher(student), **more})


def ready(module: DistillationModule, rows: Any) -> DistillationModule:
    """What a Trainer does before the first step."""
    rows.use_teacher_tokenizer_of(module.teacher_tokenizer_name)
    rows.setup("fit")
    if rows.has_two_tokenizers:
        use_two_tokenizers(rows, module.teacher, module.model, module.reporter)
    module.configure_model()
    assert module.teacher is not None
    module.teacher.attach(dataclasses.replace(module.run_context(), data=rows))
    module.student.eval()
    return module


def loss_of(module: DistillationModule, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    """The undivided loss with the values of evaluation, and the gradient."""
    module.student.zero_grad()
    parts = module.model(batch, module.teacher, module.reporter.loss)
    parts.loss.backward()
    found = {n: torch.zeros(()) if p.grad is None else p.grad.clone() for n, p in module.student.named_parameters()}
    return parts, found


def with_own_positions(batch: Batch) -> Batch:
    """The batch of one tokenizer, in the form of two: every label is compared with itself."""
    place = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    positions = torch.where(batch["labels"] == IGNORE_INDEX, -1, place)
    return {**batch, **{own: batch[name] for name, own in TEACHER_FIELDS.items()}, TEACHER_POSITIONS: positions}


OBJECTIVES: dict[str, Any] = {
    "forward KL": ForwardKL,
    "JSD": lambda: GeneralizedJSD(0.5),
    "chunks": ChunkLikelihood,
    "both": lambda: WeightedSum([ForwardKL(), ChunkLikelihood()], [0.5, 0.5]),
}


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", ["hidden states", "whole logits"])
@pytest.mark.parametrize("student", SIZES)
def test_a_step_is_the_sum_of_the_single_teachers_steps(
    student: str, path: str, objective: str, reduction: str, tmp_path: Path
) -> None:
    if (objective == "both" or path == "whole logits") and reduction == "sum":
        pytest.skip("as the others")
    file = named_rows(tmp_path)
    torch.manual_seed(2)
    model: Any = (
        student if path == "hidden states" else tiny("roberta", vocab_size=SIZES[student], max_position_embeddings=80)
    )
    settings: dict[str, Any] = {"ce_weight": 0.3, "reduction": reduction, "objective": OBJECTIVES[objective]()}
    members: dict[str, Any] = {
        OTHER: other_teacher(student),
        SAME: HFTeacher(plain_teacher(student)),
    }
    rows = data(file, student)
    both = ready(DistillationModule(model, RoutedTeacher(dict(members)), **settings), rows)
    (batch,) = rows.train_dataloader()
    assert set(batch[TEACHER_INDEX].tolist()) == {0, 1}
    found, gradient = loss_of(both, batch)
    assert (both.model.head() is None) == (path == "whole logits")
    total, divisor, value = {name: torch.zeros_like(x) for name, x in gradient.items()}, 0.0, 0.0
    labeled = batch["labels"][:, 1:] != IGNORE_INDEX
    for number, (name, member) in enumerate(members.items()):
        own_rows = data(rows_of(file, name), student)
        single = ready(DistillationModule(model, member, **settings), own_rows)
        if name == SAME:
            assert not own_rows.has_two_tokenizers
            single.reporter.use_two_tokenizers()  # measures the same
        (own,) = own_rows.train_dataloader()
        needs_positions = name == SAME and objective in ("chunks", "both")
        parts, alone = loss_of(single, with_own_positions(own) if needs_positions else own)
        total = {n: x + alone[n] for n, x in total.items()}
        divisor, value = divisor + float(parts.divisor), value + float(parts.loss.detach())
        tokens = (batch[TEACHER_INDEX] == number).unsqueeze(1).expand_as(labeled)[labeled]
        for n, x in parts.values.items():
            torch.testing.assert_close(found.values[n][tokens], x, atol=2e-6, rtol=2e-6, msg=f"{name} {n}")
        if name == SAME:
            assert found.values["aligned"][tokens].all()
        else:
            assert 0 < found.values["aligned"][tokens].mean() < 1
    assert float(found.divisor) == (1.0 if reduction == "sum" else divisor)
    scale = float(found.divisor) if reduction != "sum" else float(labeled.sum())
    assert float(found.loss.detach()) / scale == pytest.approx(value / scale, abs=2e-6, rel=2e-6)
    for name, x in total.items():
        torch.testing.assert_close(gradient[name] / scale, x / scale, atol=2e-6, rtol=2e-5, msg=name)
    assert max(float(x.abs().max()) for x in total.values()) / scale > 1e-4


@pytest.mark.parametrize("path", ["hidden states", "whole logits"])
def test_rows_of_the_students_tokenizer_have_the_plain_loss_bit_for_bit(path: str, tmp_path: Path) -> None:
    file = named_rows(tmp_path, (SAME, OTHER, OTHER, SAME, OTHER))
    torch.manual_seed(2)
    tokens = "asset:student"
    student: Any = (
        tokens if path == "hidden states" else tiny("roberta", vocab_size=SIZES[tokens], max_position_embeddings=80)
    )
    own = plain_teacher(tokens)
    rows, plain = data(file, tokens), data(file, tokens)
    both = ready(DistillationModule(student, RoutedTeacher({OTHER: BYTES, SAME: own})), rows)
    single = ready(DistillationModule(student, own), plain)
    single.reporter.use_two_tokenizers()
    (batch,), (other,) = rows.train_dataloader(), plain.train_dataloader()
    assert batch[TEACHER_FIELDS["labels"]].shape[1] > batch["labels"].shape[1]  # the other teacher's rows are longer
    mine = batch[TEACHER_INDEX] == 1
    found, gradient = loss_of(both, {name: x[mine] for name, x in batch.items()})
    expected, alone = loss_of(single, {name: x[mine] for name, x in other.items()})
    assert torch.equal(found.loss, expected.loss)
    assert float(found.loss.detach()) > 0.1
    assert all(torch.equal(found.values[name], x) for name, x in expected.values.items())
    assert all(torch.equal(gradient[name], x) for name, x in alone.items())


def test_teachers_that_all_have_the_students_tokenizer_change_no_batch(tmp_path: Path) -> None:
    file = named_rows(tmp_path)
    rows, plain = data(file), data(file)
    routed = ready(DistillationModule(BYTES, RoutedTeacher({OTHER: plain_teacher(), SAME: BYTES})), rows)
    ready(DistillationModule(BYTES, plain_teacher()), plain)
    (batch,), (other,) = rows.train_dataloader(), plain.train_dataloader()
    assert not rows.has_two_tokenizers
    assert batch.keys() - other.keys() == {TEACHER_INDEX}
    assert all(torch.equal(batch[name], x) for name, x in other.items())
    assert not loss_of(routed, batch)[0].values.keys() & {"aligned"}


@pytest.mark.parametrize("kind", [InstructionDataModule, ContrastiveDataModule])
@pytest.mark.parametrize("own", [{}, {"teacher_prompt": "{prompt} please"}], ids=["", "prompt"])
def test_each_row_is_that_of_its_teacher_alone(kind: Any, own: dict[str, Any], tmp_path: Path) -> None:
    if kind is ContrastiveDataModule:
        lines = [{**row, "teacher_id": (OTHER, SAME)[n % 2]} for n, row in enumerate(pairs(8))]
        file = str(tmp_path / "pairs.jsonl")
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    else:
        file = named_rows(tmp_path)
    routed = data(file, kind=kind, **own)
    ready(DistillationModule(BYTES, teachers()), routed)
    singles = {
        OTHER: data(file, kind=kind, teacher_tokenizer="asset:teacher", **own),
        SAME: data(file, kind=kind, **own),
    }
    for single in singles.values():
        single.setup("fit")
    batches = {name: next(iter(rows.train_dataloader())) for name, rows in singles.items()}
    (batch,) = routed.train_dataloader()
    seen = set()
    for n, number in enumerate(batch[TEACHER_INDEX].tolist()):
        name = (OTHER, SAME)[number]
        expected = {key: x[n] for key, x in batches[name].items()}
        seen.add(name)
        for key, x in expected.items():
            found = batch[key][n]
            if key in TEACHER_FIELDS.values():
                kept = int(expected[TEACHER_FIELDS["attention_mask"]].sum())
                assert int(batch[TEACHER_FIELDS["attention_mask"]][n].sum()) == kept
                found, x = found[:kept], x[:kept]
            assert torch.equal(found, x), (n, key)
        if name == SAME:
            labeled = batch["labels"][n] != IGNORE_INDEX
            read = batch[TEACHER_POSITIONS][n]
            assert (read[~labeled] == -1).all()
            assert torch.equal(batch[TEACHER_FIELDS["input_ids"]][n][read[labeled]], batch["labels"][n][labeled])
    assert seen == {OTHER, SAME}
    prompts = routed.generation_rows("train", 4, "teacher")
    for name, single in singles.items():
        expected_rows = single.generation_rows("train", 4, "teacher")
        for one, other in zip(prompts, expected_rows, strict=True):
            if one["row"]["teacher_id"] == name:
                assert one["prompt_ids"] == other["prompt_ids"]


def test_what_each_teacher_reads(tmp_path: Path) -> None:
    rows = data(named_rows(tmp_path))
    ready(DistillationModule(BYTES, teachers()), rows)
    other, same = rows.for_member(OTHER), rows.for_member(SAME)
    assert rows.has_two_tokenizers and other.has_two_tokenizers and not same.has_two_tokenizers
    assert len(other.teacher_tokenizer) == 2048 and same.teacher_tokenizer is rows.tokenizer
    assert same.vocabulary_map is None and same.tokenizer_shares("train") is None
    alone = data(rows_of(str(tmp_path / f"{OTHER}_{SAME}.jsonl"), OTHER), teacher_tokenizer="asset:teacher")
    alone.setup("fit")
    assert other.vocabulary_map is alone.vocabulary_map
    assert other.tokenizer_shares("train") == alone.tokenizer_shares("train")
    assert other.longest("teacher") == alone.longest("teacher") and other.longest() == alone.longest()
    assert other.largest_id("teacher") == alone.largest_id("teacher") and other.largest_id() == alone.largest_id()
    assert same.longest("teacher") == same.longest() and same.largest_id("teacher") < 1024
    assert other.splits == same.splits == ["train"]
    assert rows.report["train"]["aligned_labels"] == alone.report["train"]["aligned_labels"]
    assert rows.teacher_pad_id < 1024
    for name in ("teacher_tokenizer", "vocabulary_map", "teacher_text_tokenizer"):
        with pytest.raises(ValueError, match=r"other, same have several tokenizers: ask for_member\(name\)"):
            getattr(rows, name)


def trained(path: str, teacher: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The student after a fit."""
    rows = data(path, batch_size=kwargs.pop("batch_size", 12), **kwargs.pop("rows", {}))
    settings: dict[str, Any] = {"optimizer": SGD, "ce_weight": 0.3, **kwargs.pop("module", {})}
    module = Run(BYTES, teacher, **settings)
    return fit_data(module, rows, kwargs.pop("max_steps"), seed=0, **kwargs)


def test_micro_batches_add_up_to_one_step(tmp_path: Path) -> None:
    """Some of the micro-batches have rows of one teacher alone."""
    file = named_rows(tmp_path, (OTHER, OTHER, SAME, SAME, OTHER, SAME))
    one = trained(file, teachers(), max_steps=2)
    assert_same_student(trained(file, teachers(), max_steps=2, batch_size=2, accumulate_grad_batches=6), one, atol=2e-6)


def test_validation_of_each_teacher_is_that_of_its_own_run(tmp_path: Path) -> None:
    file = named_rows(tmp_path)
    own = plain_teacher()
    members: dict[str, Any] = {OTHER: other_teacher(), SAME: own}

    def validated(path: str, teacher: Any) -> dict[str, float]:
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        (found,) = trainer.validate(
            DistillationModule(BYTES, teacher), datamodule=data(file, val=path, batch_size=5), verbose=False
        )
        return dict(found)

    found = validated(file, RoutedTeacher(dict(members)))
    for name, member in members.items():
        alone = validated(rows_of(file, name), member)
        measured = {key: value for key, value in alone.items() if f"{key}/{name}" in found}
        assert {"val/forward_kl", "val/kd", "val/ce", "val/jsd"} <= measured.keys()
        for key, value in measured.items():
            assert found[f"{key}/{name}"] == pytest.approx(value, abs=2e-6, rel=2e-6), key
    assert found[f"val/aligned_share/{SAME}"] == 1 > found[f"val/aligned_share/{OTHER}"] > 0.5
    assert "val/head_kl" not in found


def test_responses_of_the_student_are_read_by_each_teacher_in_its_tokens(tmp_path: Path) -> None:
    rows = data(named_rows(tmp_path), max_length=64)
    module = Run(BYTES, teachers(), optimizer=STILL, responses=OnPolicy(1.0, max_new_tokens=8))
    fit_data(module, rows, steps=2, seed=0)
    batch = module.take_generated_batch()
    assert batch is not None
    tokenizers = [rows.for_member(name).teacher_tokenizer for name in (OTHER, SAME)]
    own_labels, own_ids = (batch[TEACHER_FIELDS[name]] for name in ("labels", "input_ids"))
    compared = [0, 0]
    for n, number in enumerate(batch[TEACHER_INDEX].tolist()):
        labels, read = batch["labels"][n], batch[TEACHER_POSITIONS][n]
        labeled = labels != IGNORE_INDEX
        compared[number] += int((read >= 0).sum())
        theirs = own_labels[n][own_labels[n] != IGNORE_INDEX]
        if number == 1:
            assert torch.equal(theirs, labels[labeled])
            assert torch.equal(own_ids[n][read[labeled]], labels[labeled])
        ends = [rows.tokenizer.eos_token_id, tokenizers[number].eos_token_id]
        ours = rows.tokenizer.decode([t for t in labels[labeled].tolist() if t != ends[0]])
        text = tokenizers[number].decode([t for t in theirs.tolist() if t != ends[1]])
        assert ours.strip("\ufffd ").startswith(text.strip("\ufffd "))
    assert min(compared) > 0
    assert torch.isfinite(torch.tensor([line["train/loss"] for line in module.logged])).all()
    assert 0 < module.logged[-1]["train/aligned_share"] < 1


def test_a_cached_teacher_among_them(tmp_path: Path) -> None:
    file = named_rows(tmp_path)
    own = rows_of(file, OTHER)
    words = ["cache", "--config", "cross_tokenizer", "--data.train", own, "--data.val", "null", "--data.test", "null"]
    words += ["--data.max_length", "64", "--model.teacher_kwargs", '{"dtype": "float32"}', "--dtype", "float32"]
    assert main([*words, "--output", str(tmp_path / "cache"), "--trainer.accelerator", "cpu"]) == 0
    cached = RoutedTeacher({OTHER: CachedTeacher(str(tmp_path / "cache")), SAME: plain_teacher()})
    given = {"rows": {"teacher_tokenizer": {OTHER: "asset:teacher"}}}
    live = trained(file, teachers(), max_steps=2, batch_size=5)
    assert_same_student(trained(file, cached, max_steps=2, batch_size=5, **given), live, atol=2e-6)


def test_a_run_of_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = named_rows(tmp_path, count=24)
    members = json.dumps({OTHER: "asset:teacher", SAME: BYTES})
    few = [item for split in ("train", "val", "test") for item in (f"--data.{split}", file)]
    chosen = ["--model.teacher", "RoutedTeacher", "--model.teacher.teachers", members, "--model.student", BYTES]
    words = [*runs.little(tmp_path / "root", steps=2), *few, *chosen, "--trainer.limit_test_batches", "1"]
    words += ["--results.max_new_tokens", "2"]
    main(["preflight", *words[1:]])
    out = capsys.readouterr().out
    assert "two tokenizers, teacher 'other': " in out and "an answer in both tokenizers" in out
    assert "Traceback" not in out and "Error" not in out
    assert main(words) == 0


# ------------------------------------------------------------------------------------------------------------ refusals
def test_what_cannot_be_computed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    file = named_rows(tmp_path)
    rewards = MiniLLM(0.0, max_new_tokens=4)
    for module, match in (
        (DistillationModule(BYTES, teachers(), AdaptiveKL()), "AdaptiveKL cannot be computed"),
        (DistillationModule(BYTES, teachers(), ce_weight=0.5, responses=rewards), "needs one tokenizer"),
    ):
        with pytest.raises(ValueError, match=match):
            fit_data(module, data(file), steps=1, seed=0)
    own = DistillationModule(BYTES, RoutedTeacher({OTHER: SelfTeacher("ema"), SAME: "asset:student_byte_fallback"}))
    with pytest.raises(ValueError, match="teacher_tokenizer must not be given for a SelfTeacher: the teacher is the"):
        fit_data(own, data(file, teacher_tokenizer={OTHER: "asset:teacher"}), steps=1, seed=0)
    with pytest.raises(ValueError, match=r"the teachers of RoutedTeacher have several tokenizers"):
        rows = data(file)
        routed = ready(DistillationModule(BYTES, teachers()), rows)
        assert routed.teacher is not None
        routed.teacher.logits(next(iter(rows.train_dataloader())))


def test_wrong_tokenizers_of_teachers_are_named(tmp_path: Path) -> None:
    file = named_rows(tmp_path)
    module = DistillationModule(BYTES, teachers())
    with pytest.raises(
        ValueError, match=r"teacher_tokenizer must have names of teachers \(other, same\) as keys, got 'x'"
    ):
        ready(module, data(file, teacher_tokenizer={"x": "asset:teacher"}))
    with pytest.raises(ValueError, match="must be one tokenizer unless the teacher is a RoutedTeacher, got some for a"):
        ready(DistillationModule(BYTES, "asset:teacher"), data(file, teacher_tokenizer={"a": "asset:teacher"}))
    with pytest.raises(ValueError, match="teacher 'same': teacher_tokenizer: '/nowhere' cannot be loaded"):
        ready(module, data(file, teacher_tokenizer={SAME: "/nowhere"}))
    with pytest.raises(ValueError, match=r"jsonl:1: field 'teacher_id' must be one of other, third, got \"first\""):
        members = {OTHER: "asset:teacher", "third": plain_teacher()}
        ready(DistillationModule(BYTES, RoutedTeacher(members)), data(named_rows(tmp_path, ("first", OTHER))))


# --------------------------------------------------------------------------------------------------------------- ranks
def on_two_ranks(rank: int, file: str) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    return {kind: ranked(file, strategy, 2) for kind, strategy in strategies().items()}


def ranked(file: str, strategy: Any, ranks: int) -> dict[str, Tensor]:
    """Two steps; the first of two ranks has no row of the plain teacher in the first step."""
    rows = data(file, batch_size=8 // ranks)
    module = DistillationModule(BYTES, teachers(), ce_weight=0.3, optimizer=SGD)
    fit_data(module, rows, steps=2, seed=0, devices=ranks, strategy=strategy, use_distributed_sampler=False)
    return full_state_dict(module.student)


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    names = (OTHER, SAME) * 4 + (OTHER, OTHER, SAME, OTHER) * 2
    file = named_rows(tmp_path, names, count=16)
    found = processes.run(on_two_ranks, file)
    one = ranked(file, "auto", 1)
    for states in found:
        for kind, state in states.items():
            for name, x in one.items():
                torch.testing.assert_close(state[name], x, atol=2e-5, rtol=0, msg=f"{kind} {name}")
