"""What the student writes becomes a batch like one read from a file; a coin per step decides when it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import tiny
from kd_lightning import DistillationLoss, ForwardKL, InstructionDataModule
from kd_lightning.models.generate import RestrictVocabulary, Sampling, TeacherMixture, generate, require_eos_token_ids
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import gather_rows, prompts
from kd_lightning.rollout.on_policy import OnPolicy
from kd_lightning.rollout.replay import ReplayBuffer
from kd_lightning.schedules import Linear
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.training.student import StudentWithLoss
from leaves import RESPONSES
from locations import ROOT
from rollouts import NOT, Script, assert_same, author, batch


# ------------------------------------------------------------------------------------------------------------- batches
def test_prompts_are_padded_on_the_left() -> None:
    found, mask = prompts(batch(([5, 6, 7], [9, 2]), ([8], [9, 9, 2])))
    assert found.tolist()[0] == [5, 6, 7] and found.tolist()[1][2:] == [8]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_of_several_turns_the_first_is_answered() -> None:
    given = batch(([5, 6], [9, 2, 7, 9, 2]))
    given["labels"][0, 4] = NOT  # the user's second turn
    found, mask = prompts(given)
    assert found.tolist() == [[5, 6]] and mask.tolist() == [[1, 1]]


def test_written_is_what_a_file_would_give() -> None:
    given = batch(([5, 6, 7], [9, 2]), ([8], [9, 9, 2]), ([4, 4], [9]))
    student = Script([[10, 2, 11, 11], [10, 11, 3, 0], [10, 11, 12, 13]], ends=[2, 3])
    writer = author(student)
    found = writer.respond(given, Sampling(4))
    wanted = batch(([5, 6, 7], [10, 2]), ([8], [10, 11, 3]), ([4, 4], [10, 11, 12, 13]))  # either end; no end
    assert_same(found, {**wanted, "source": torch.full((3,), 2)})
    assert {name: (float(a), float(b)) for name, (a, b) in writer.notes.items()} == {
        "response_length": (9, 3),
        "finished": (2, 3),
        "empty": (0, 3),
    }
    assert not student.asked["training"] and not student.asked["grad"] and student.training


@pytest.mark.parametrize(("tokens", "length", "finished", "empty"), [([2, 5, 5], 1, 1, 1), ([5, 5, 5], 3, 0, 0)])
def test_only_an_end_or_no_end_is_counted(tokens: list[int], length: int, finished: int, empty: int) -> None:
    writer = author(Script([tokens]))
    found = writer.respond(batch(([5, 6], [9, 2])), Sampling(3))
    assert int((found["labels"] != NOT).sum()) == length
    notes = {name: float(a) for name, (a, _) in writer.notes.items()}
    assert notes == {"response_length": length, "finished": finished, "empty": empty}


def test_a_row_that_counts_nothing_gets_no_response() -> None:
    given = batch(([5, 6], [9, 2]), ([5, 6], [7]))
    given["labels"][1] = NOT
    writer = author(Script([[10, 2], [10, 2]]))
    found = writer.respond(given, Sampling(2))
    assert found["source"].tolist() == [2, 0] and (found["labels"][1] == NOT).all()
    assert writer.notes["response_length"][1] == 1


def test_room() -> None:
    given = batch(([5, 6, 7], [9, 2]), ([8], [9, 2]))
    found = author(Script([[10] * 6] * 2), max_length=5).respond(given, Sampling(6))
    assert (found["labels"] != NOT).sum(1).tolist() == [2, 4]  # cut where the data would be cut
    student = Script([[10] * 6] * 2, places=7)
    author(student).respond(given, Sampling(6))
    assert student.asked["max_new_tokens"] == 4  # the model has no more places


def test_the_same_text_read_from_a_file(tmp_path: Path) -> None:
    data = InstructionDataModule("asset:train", tokenizer="asset:student", batch_size=16, shuffle=False, max_length=96)
    data.setup("fit")
    given = next(iter(data.train_dataloader()))
    student = load_causal_lm("asset:student").train()
    found = author(student).respond(given, Sampling(24, temperature=0.0))
    lines = ROOT.joinpath("kd_lightning/assets/train.jsonl").read_text().splitlines()
    kept, rows = [], []
    for n, row_id in enumerate(given["row_ids"].tolist()):
        tokens = found["labels"][n][found["labels"][n] != NOT]
        text = data.tokenizer.decode(tokens[:-1])
        if tokens[-1] == 1 and data.tokenizer.encode(text, add_special_tokens=False) == tokens[:-1].tolist():
            kept.append(n)
            rows.append(json.dumps({**json.loads(lines[row_id]), "output": text}))
    assert len(kept) >= 8
    (tmp_path / "written.jsonl").write_text("\n".join(rows))
    again = InstructionDataModule(
        str(tmp_path / "written.jsonl"), tokenizer="asset:student", batch_size=16, shuffle=False, max_length=96
    )
    again.setup("fit")
    read = next(iter(again.train_dataloader()))
    width = read["labels"].shape[1]
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(read[name], found[name][kept][:, :width]), name


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
def test_rows_of_all_ranks(sizes: tuple[int, int]) -> None:
    whole = batch(([5, 6], [9, 2]), ([5], [7]), ([4, 4, 4], [8, 8, 2]), ([3], [2]))
    one, two = (
        dict(zip(whole, part, strict=True)) for part in zip(*(c.split(sizes) for c in whole.values()), strict=True)
    )
    narrow = {name: column[:, :4] if column.ndim == 2 else column for name, column in one.items()}
    shapes = [torch.tensor(rank["labels"].shape) for rank in (narrow, two)]
    columns, asked = iter(sorted(whole)), []

    def gather(tensor: Tensor) -> list[Tensor]:
        if len(asked) == 0:
            asked.append(1)
            return shapes
        name, out = next(columns), []
        for rank in (narrow, two):
            blank = torch.full_like(tensor, NOT if name == "labels" else 0)
            blank[tuple(slice(n) for n in rank[name].shape)] = rank[name]
            out.append(blank)
        return out

    found = gather_rows(narrow, 2, gather)
    for name in ("input_ids", "attention_mask", "labels", "row_ids"):
        kept = whole[name].clone()
        if kept.ndim == 2:
            kept[: sizes[0], 4:] = NOT if name == "labels" else 0
        assert torch.equal(found[name], kept), name


# ---------------------------------------------------------------------------------------------------------- generation
def test_seed_and_place_decide_what_is_written() -> None:
    student = tiny("llama")
    given = batch(([5, 6, 7], [9, 2]), ([8], [9, 9, 2]))

    def written(**where: int) -> Tensor:
        found = author(student, **where).respond(given, Sampling(12))
        return torch.nn.functional.pad(found["labels"], (0, 20 - found["labels"].shape[1]))

    before = torch.get_rng_state()
    one = written(seed=1, batch=3)
    assert torch.equal(one, written(seed=1, batch=3)) and torch.equal(before, torch.get_rng_state())
    for other in ({"seed": 2, "batch": 3}, {"seed": 1, "batch": 4}, {"seed": 1, "batch": 3, "rank": 1, "ranks": 2}):
        assert not torch.equal(one, written(**other))


def test_a_row_is_written_as_if_it_were_alone() -> None:
    student = tiny("llama")
    given = batch(([5, 6, 7, 8, 9], [9, 2]), ([8], [9, 9, 2]))
    both = author(student).respond(given, Sampling(10, temperature=0.0))["labels"]
    for n in range(2):
        alone = {name: column[n : n + 1] for name, column in given.items()}
        labels = author(student).respond(alone, Sampling(10, temperature=0.0))["labels"]
        assert torch.equal(labels[labels != NOT], both[n][both[n] != NOT])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mixture_is_the_sum_of_both(kind: str) -> None:
    student, teacher = tiny(kind), tiny("llama")
    ids = torch.randint(3, 80, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    greedy = Sampling(8, temperature=0.0)
    whole = generate(student, ids, mask, greedy, processors=[TeacherMixture(teacher, 1.0, 1.0, ids, mask)])
    assert torch.equal(whole, generate(teacher, ids, mask, greedy))
    assert not torch.equal(whole, generate(student, ids, mask, greedy))

    processor = TeacherMixture(teacher, 0.3, 2.0, ids, mask)
    scores = torch.randn(3, 80)
    with torch.no_grad():
        for width in (6, 7, 9):  # the teacher reads on from what it has read
            grown = torch.cat([ids, ids[:, : width - 6]], 1)
            long = torch.cat([mask, torch.ones_like(ids)[:, : width - 6]], 1)
            mixed = (processor(grown, scores) / 2).softmax(-1)
            places = (long.cumsum(1) - 1).clamp_min(0)
            p = (teacher(input_ids=grown, attention_mask=long, position_ids=places).logits[:, -1] / 2).softmax(-1)
            torch.testing.assert_close(mixed, 0.3 * p + 0.7 * (scores / 2).softmax(-1))


def test_tokens_that_the_teacher_does_not_know_are_not_written() -> None:
    assert RestrictVocabulary(3)(torch.zeros(1, 1), torch.zeros(1, 5)).isinf().tolist() == [[False] * 3 + [True] * 2]
    student, teacher = tiny("llama", vocab_size=90), HFTeacher(tiny("llama"))  # type: ignore[arg-type]
    teacher.load()
    with torch.no_grad():
        student.lm_head.weight[:] = student.lm_head.weight[85].sign()  # every token as likely as any other
    given = batch(*[([5, 6], [9])] * 16)
    free = author(student).respond(given, Sampling(20))["labels"]
    bound = author(student, teacher=teacher).respond(given, Sampling(20))["labels"]
    assert free.max() >= 80 > bound.max() > 3


def test_label_log_probs() -> None:
    student, teacher = tiny("gpt2"), HFTeacher(tiny("llama", vocab_size=90))  # type: ignore[arg-type]
    teacher.load()
    model = StudentWithLoss(student.train(), DistillationLoss(ForwardKL()))  # GPT-2 has dropout
    given = batch(([5, 6, 7], [9, 2]), ([8], [9, 9, 2]))
    found = RolloutContext(model, teacher).label_log_probs(given, 2.0)
    assert student.training and not any(x.requires_grad for x in found)
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    for x, one in zip(found, (student.eval(), teacher.model), strict=True):
        with torch.no_grad():
            log_q = (one(**inputs).logits[:, :-1, :80].double() / 2).log_softmax(-1)
        labels = given["labels"][:, 1:]
        wanted = log_q.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == NOT, 0)
        torch.testing.assert_close(x[:, 1:].double(), wanted, atol=1e-5, rtol=1e-5)
        assert not x[:, 0].any()


# ------------------------------------------------------------------------------------------------------------ the coin
def test_the_coin_is_one_per_step_and_fair() -> None:
    def coins(**kwargs: int) -> list[float]:
        return [author(None, step=step, **kwargs).coin() for step in range(2000)]

    one = coins()
    assert one == coins(rank=1, ranks=2) == coins(batch=7, micro=1) and one != coins(seed=1)
    tenths = torch.tensor(one).histc(10, 0, 1)
    assert 150 < tenths.min() and tenths.max() < 250


def test_the_share_of_steps() -> None:
    given = batch(([5, 6], [9, 2]))
    source = OnPolicy(Linear(0.2, 0.8), max_new_tokens=2)

    def share() -> float:
        student = Script([[10, 2]])
        return sum(source(given, author(student, step=s))["source"].item() == 2 for s in range(1000)) / 1000

    assert share() == pytest.approx(0.2, abs=0.04)
    source.share.update(1.0, {})  # type: ignore[union-attr]
    assert share() == pytest.approx(0.8, abs=0.04)
    student = Script([[10, 2]])
    assert OnPolicy(0.0)(given, author(student)) is given and not student.asked
    assert all(OnPolicy(1.0)(given, author(Script([[10, 2]]), step=s)) is not given for s in range(50))


# -------------------------------------------------------------------------------------------------------------- leaves
def test_every_source_is_listed() -> None:
    ours = {leaf.__name__ for leaf in ResponseSource.__subclasses__() if leaf.__module__.startswith("kd_lightning.")}
    assert ours == set(RESPONSES)


@pytest.mark.parametrize("name", RESPONSES)
def test_all_state_is_tensors_and_comes_back(name: str, tmp_path: Path) -> None:
    source, other = RESPONSES[name](), RESPONSES[name]()
    for part in source.modules():
        if isinstance(part, Linear):
            part.update(0.7, {})
        if isinstance(part, ReplayBuffer):
            part.push(batch(([5, 6], [9, 2]), ([8], [9, 9, 2])))
    source.validated(3.0)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(other.state_dict(), source.state_dict())


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.5}, ["share", "1.5", "[0, 1]"]),
        ({"share": -0.1}, ["share", "-0.1"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"temperature": -1.0}, ["temperature", "-1"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_p": 0.0}, ["top_p", "0"]),
        ({"top_p": 1.1}, ["top_p", "1.1"]),
    ],
)
def test_arguments(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        OnPolicy(**settings)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_models_that_cannot_write() -> None:
    assert require_eos_token_ids(Script([[1]], ends=[2, 3])) == [2, 3]
    for ends in (None, []):
        with pytest.raises(ValueError, match="eos_token_id"):
            OnPolicy().check(Script([[1]], ends=ends), None, None)
    with pytest.raises(ValueError, match=r"max_new_tokens .* less than max_length of 96, .* got 96"):
        OnPolicy(max_new_tokens=96).check(Script([[1]], places=200), None, 96)
    with pytest.raises(ValueError, match=r"max_new_tokens .* max_position_embeddings of 64, .* got 80"):
        OnPolicy(max_new_tokens=80).check(Script([[1]]), None, 96)
    OnPolicy(max_new_tokens=63).check(Script([[1]]), None, 96)
