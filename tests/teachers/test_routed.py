"""Every row is taught by the teacher that it names; together the teachers make the sum of their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
import runs
from architectures import VOCABULARY, tiny
from kd_lightning import (
    TAID,
    DistillationModule,
    ForwardKL,
    HFTeacher,
    OffloadedTeacher,
    OnPolicy,
    RoutedTeacher,
    SelfTeacher,
    Teacher,
    TeacherEntropyGate,
    Weighted,
)
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from kd_lightning.constants import TEACHER_FIELDS, TEACHER_INDEX
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule
from kd_lightning.distributed.dtensor import full_state_dict, is_sharded
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK, top_k
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.strategies import FSDP2Strategy
from plans import planned
from refusals import refused
from sharded_fits import joined, strategies, train
from tiny_fits import SGD, Batch, Run, fit, rows, split

NAMES = ("math", "code", "prose.v2")


def routed_rows(count: int = 9, vocabulary: int = VOCABULARY, teachers: int = 3) -> Batch:
    """Rows whose teachers take turns, not evenly."""
    return {**rows(count, vocabulary), TEACHER_INDEX: torch.tensor([(n * n + n // 4) % teachers for n in range(count)])}


class TopFive(Teacher):
    """A teacher of which the top five are known."""

    name = None
    head: Head | None = None

    def __init__(self, model: Any) -> None:
        self.inner = HFTeacher(model)

    def load(self, device: Any = "cpu") -> None:
        self.inner.load(device)

    def to(self, device: Any) -> None:
        self.inner.to(device)

    def hidden(self, batch: Any) -> Tensor:
        raise AssertionError

    def logits(self, batch: Any) -> TopK:
        found = self.inner.logits(batch)[..., :VOCABULARY]
        labels = batch["labels"].roll(-1, 1).clamp_min(0)
        flat = top_k(found.flatten(0, 1), labels.flatten(), 5)
        shape = labels.shape
        return TopK(flat.ids.view(*shape, 5), flat.log_probs.view(*shape, 5), flat.log_tail.view(shape), VOCABULARY)

    def fingerprint(self) -> str:
        return "five"


def kinds() -> dict[str, Teacher]:
    """Three teachers of other widths, paddings, factors and dtypes; the last cannot be split."""
    torch.manual_seed(3)
    wide = tiny("gemma2", hidden_size=48, vocab_size=VOCABULARY + 8).to(torch.bfloat16)
    return {
        "math": HFTeacher(tiny("llama", hidden_size=48)),  # type: ignore[arg-type]
        "code": OffloadedTeacher(wide),  # type: ignore[arg-type]
        "prose.v2": HFTeacher(tiny("roberta")),  # type: ignore[arg-type]
    }


def gradients(module: DistillationModule) -> dict[str, Tensor]:
    return {
        name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in module.student.named_parameters()
    }


def loss_of(student: Any, teacher: Any, batch: Batch, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """The undivided loss of a batch with its gradient."""
    module = DistillationModule(student, teacher, **settings)
    module.configure_model()
    module.student.zero_grad()
    module.student.eval()
    parts = module.model(batch, module.teacher, module.reporter.loss)
    parts.loss.backward()
    return parts, gradients(module)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("kind", ["llama", "roberta"], ids=["fused", "whole logits"])
@pytest.mark.parametrize("which", ["all", "split", "top k"])
def test_a_step_is_the_sum_of_the_single_teachers_steps(which: str, kind: str, reduction: str) -> None:
    teachers = kinds()
    if which == "split":
        del teachers["prose.v2"]
    if which == "top k":
        teachers["prose.v2"] = TopFive(tiny("llama", vocab_size=VOCABULARY + 2))
    batch = routed_rows(teachers=len(teachers))
    student = tiny(kind)
    settings: dict[str, Any] = {
        "ce_weight": 0.3,
        "reduction": reduction,
        "temperature": 1.0 if which == "top k" else 2.0,
    }
    if which == "top k":
        settings["monitors"] = {}
    found, gradient = loss_of(student, RoutedTeacher(dict(teachers)), batch, **settings)
    total, divisor = {name: torch.zeros_like(x) for name, x in gradient.items()}, 0.0
    values = {name: torch.full_like(x, torch.nan) for name, x in found.values.items()}
    labeled = batch["labels"][:, 1:] != -100
    for number, teacher in enumerate(teachers.values()):
        own = batch[TEACHER_INDEX] == number
        alone = {name: column[own] for name, column in batch.items() if name != TEACHER_INDEX}
        parts, single = loss_of(student, teacher, alone, **settings)
        total = {name: x + single[name] for name, x in total.items()}
        divisor += float(parts.divisor)
        tokens = own.unsqueeze(1).expand_as(labeled)[labeled]
        for name, x in values.items():
            x[tokens] = parts.values[name].to(x.dtype)
        assert torch.allclose(found.weights[tokens], parts.weights)
    assert float(found.divisor) == (1.0 if reduction == "sum" else divisor)
    for name, x in total.items():
        torch.testing.assert_close(gradient[name], x, atol=3e-5, rtol=1e-4)
    for name, x in values.items():
        torch.testing.assert_close(found.values[name], x, atol=2e-5, rtol=1e-5)
    assert max(float(x.abs().max()) for x in total.values()) > 0.01


def test_a_single_teacher_is_that_teacher() -> None:
    batch, student = {**rows(6, VOCABULARY), TEACHER_INDEX: torch.zeros(6, dtype=torch.long)}, tiny("llama")
    teacher = tiny("llama", hidden_size=48)
    found, gradient = loss_of(student, RoutedTeacher({"a": teacher, "b": tiny("gpt2")}), batch)
    expected, single = loss_of(student, HFTeacher(teacher), {k: v for k, v in batch.items() if k != TEACHER_INDEX})  # type: ignore[arg-type]
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(gradient[name], x) for name, x in single.items())


def test_teachers_that_read_an_input_of_their_own() -> None:
    """Longer prompts on the teachers' side, one token more for each row than for the row before."""
    batch, teachers, student = routed_rows(), kinds(), tiny("llama")
    shape = (9, 14 + 9)
    own = {name: torch.full(shape, fill) for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}
    for n in range(9):
        for name, fill in (("input_ids", 5), ("attention_mask", 1), ("labels", -100)):
            own[name][n, :n] = fill
            own[name][n, n : n + 14] = batch[name][n]
    batch |= {TEACHER_FIELDS[name]: column for name, column in own.items()}
    found, gradient = loss_of(student, RoutedTeacher(dict(teachers)), batch, ce_weight=0.3)
    total = {name: torch.zeros_like(x) for name, x in gradient.items()}
    for number, teacher in enumerate(teachers.values()):
        rows_of_it = batch[TEACHER_INDEX] == number
        alone = {name: column[rows_of_it] for name, column in batch.items() if name != TEACHER_INDEX}
        _, single = loss_of(student, teacher, alone, ce_weight=0.3)
        total = {name: x + single[name] for name, x in total.items()}
    for name, x in total.items():
        torch.testing.assert_close(gradient[name], x, atol=3e-5, rtol=1e-4)
    plain = {name: column for name, column in batch.items() if name not in TEACHER_FIELDS.values()}
    other, _ = loss_of(student, RoutedTeacher(dict(teachers)), plain, ce_weight=0.3)
    assert (other.loss.detach() - found.loss.detach()).abs() > 1e-3


def test_token_weights_are_summed_over_the_teachers() -> None:
    batch, student = routed_rows(), tiny("llama")
    plain = {"math": tiny("llama"), "code": tiny("llama"), "prose": tiny("llama")}
    objective = Weighted(ForwardKL(), TeacherEntropyGate(4.0))
    found, _ = loss_of(student, RoutedTeacher(dict(plain)), batch, objective=objective)
    single = []
    for number, teacher in enumerate(plain.values()):
        own = {name: column[batch[TEACHER_INDEX] == number] for name, column in batch.items() if name != TEACHER_INDEX}
        single.append(loss_of(student, HFTeacher(teacher), own, objective=objective)[0].token_weights)  # type: ignore[arg-type]
    assert found.token_weights.keys() == single[0].keys() and found.token_weights
    for path, x in found.token_weights.items():
        torch.testing.assert_close(x, sum(one[path] for one in single))


def test_components_and_schedules_of_a_routed_step() -> None:
    batch = routed_rows()
    plain = {"math": tiny("llama"), "code": tiny("llama"), "prose.v2": tiny("llama")}
    module = fit(
        Run(tiny("llama"), RoutedTeacher(plain), TAID(), ce_weight=0.3), split(batch, 3, 3, 3), split(batch, 9)
    )
    last = {name: float(x) for name, x in module.trainer.callback_metrics.items()}
    assert all(line["train/loss"] > 0 for line in module.logged)
    for name in ("forward_kl", "kd", "teacher_nll", "agreement"):
        labeled = (batch["labels"][:, 1:] != -100).sum(1)
        counts = [int(labeled[batch[TEACHER_INDEX] == number].sum()) for number in range(3)]
        mean = sum(count * last[f"val/{name}/{member}"] for count, member in zip(counts, plain, strict=True))
        assert mean / sum(counts) == pytest.approx(last[f"val/{name}"], rel=1e-5)
        assert f"{name}/math" in module.measured
    assert len({last[f"val/forward_kl/{member}"] for member in plain}) == 3


def test_logits_of_all_teachers_in_one_tensor() -> None:
    teacher, batch = RoutedTeacher(dict(kinds())), routed_rows()
    teacher.load()
    found = teacher.logits(batch)
    assert found.shape == (*batch["labels"].shape, VOCABULARY + 8) and found.dtype == torch.float32
    assert (found[..., VOCABULARY:] == -torch.inf).all(2).all(1).tolist() == (batch[TEACHER_INDEX] != 1).tolist()
    assert teacher.head is None and teacher.model is None and not teacher.can_generate
    with pytest.raises(ValueError, match="LM heads of their own"):
        teacher.hidden(batch)
    first = RoutedTeacher(dict(kinds()))
    first.load()
    assert first.fingerprint() == teacher.fingerprint()


def test_the_student_may_be_one_of_the_teachers() -> None:
    torch.manual_seed(0)
    teacher = RoutedTeacher({"own": SelfTeacher("ema", 0.5), "other": tiny("gpt2")})
    module = fit(Run(tiny("llama"), teacher, ce_weight=0.5), split(routed_rows(8, teachers=2), 4, 4))
    assert module.teacher_state is not None
    names = [name for name in module.state_dict() if name.startswith("teacher_state.0.")]
    assert len(names) == sum(1 for _ in module.student.named_parameters())
    own = teacher.teachers["own"].state
    assert own is not None
    moved = dict(own.named_parameters())
    assert any(not torch.equal(p, moved[n.replace(".", "/")]) for n, p in module.student.named_parameters())


# ------------------------------------------------------------------------------------------------------------ refusals
def test_bad_arguments() -> None:
    for teachers, match in (({}, "at least one teacher"), ({"": "x"}, "not empty"), ({"a": None}, r"teachers\['a'\]")):
        with pytest.raises(ValueError, match=match):
            RoutedTeacher(teachers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teachers\['a'\] must be .* got RoutedTeacher"):
        RoutedTeacher({"a": RoutedTeacher({"b": "asset:teacher"})})
    with pytest.raises(ValueError, match="default must be one of a, b or None, got 'c'"):
        RoutedTeacher({"a": "x", "b": "y"}, default="c")
    with pytest.raises(ValueError, match="column must be"):
        RoutedTeacher({"a": "x"}, column="")
    with pytest.raises(ValueError, match="teacher_cache must be false: RoutedTeacher cannot be in one cache"):
        DistillationModule("asset:student", RoutedTeacher({"a": "x"}), teacher_cache=True)


def test_a_batch_without_the_column() -> None:
    teachers = {"a": tiny("llama"), "b": tiny("llama")}
    with pytest.raises(ValueError, match=r"no column 'teacher_index'.*'task'"):
        RoutedTeacher(teachers, column="task").shares(rows(3))
    (only,) = RoutedTeacher(teachers, default="b").shares(rows(3))
    assert only.rows is None and only.teacher.name is None
    with pytest.raises(ValueError, match=r"teacher_index must be in \[0, 1\], got 7"):
        RoutedTeacher(teachers).shares({**rows(2), TEACHER_INDEX: torch.tensor([0, 7])})


def named_rows(
    folder: Path, name: Any = "math", other: Any = "code", count: int = 24, field: str = "teacher_id"
) -> Path:
    """Rows of the bundled data that name two teachers in turn; a null means no field."""
    path = folder / "rows.jsonl"
    found = []
    for number, line in enumerate(Path(resolve("asset:train")).read_text(encoding="utf-8").splitlines()[:count]):
        row = {**json.loads(line), field: (name, other)[number % 2]}
        found.append(json.dumps({key: value for key, value in row.items() if value is not None}))
    path.write_text("\n".join(found) + "\n", encoding="utf-8")
    return path


def data(path: Path, **kwargs: Any) -> InstructionDataModule:
    module = InstructionDataModule(str(path), val=str(path), tokenizer="asset:student", batch_size=4, **kwargs)
    module.setup("fit")
    return module


def test_rows_get_the_number_of_their_teacher(tmp_path: Path) -> None:
    module = data(named_rows(tmp_path), shuffle=True)
    module.add_index_column(TEACHER_INDEX, "teacher_id", ["code", "math"])
    for loader in (module.train_dataloader(), module.val_dataloader(), module.every_row("train")):
        batches = list(loader)
        assert sum(len(batch["row_ids"]) for batch in batches) == 24
        for batch in batches:
            assert torch.equal(batch[TEACHER_INDEX], 1 - batch["row_ids"] % 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [(None, "it is missing"), ("history", 'got "history"'), (3, "got 3"), ("", 'got ""'), (["math"], "got")],
    ids=["missing", "unknown", "number", "empty", "list"],
)
def test_a_row_that_names_no_teacher_is_refused_with_its_line(name: Any, said: str, tmp_path: Path) -> None:
    module = data(named_rows(tmp_path, other=name))
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl:2: field 'teacher_id' must be one of math, code, {said}"
    ) as error:
        module.add_index_column(TEACHER_INDEX, "teacher_id", ["math", "code"])
    assert "\n" not in str(error.value) and "12 rows" in str(error.value)
    module.add_index_column(TEACHER_INDEX, "teacher_id", ["math", "code"], "code")
    (batch, *_) = module.every_row("val")
    assert torch.equal(batch[TEACHER_INDEX], batch["row_ids"] % 2)


def test_both_responses_of_a_pair_have_one_teacher(tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": f"Say {n}", "chosen": f"{n}", "rejected": "no", "who": ("a", "b")[n % 2]})
        for n in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    module = ContrastiveDataModule(str(tmp_path / "pairs.jsonl"), tokenizer="asset:student", batch_size=2)
    module.setup("fit")
    module.add_index_column(TEACHER_INDEX, "who", ["a", "b"])
    for batch in module.train_dataloader():
        assert torch.equal(batch[TEACHER_INDEX], batch["row_ids"] % 2)
        assert sorted(batch["source"].tolist()) == [1] * (len(batch["source"]) // 2) + [2] * (len(batch["source"]) // 2)


# ----------------------------------------------------------------------------------------------------------------- runs
TEACHERS = {"math": "asset:teacher", "code": {"class_path": "OffloadedTeacher", "init_args": {"path": "asset:student"}}}


def words(root: Path, path: Path, *extra: str, teachers: dict[str, Any] | None = None, steps: int = 2) -> list[str]:
    chosen = ["--model.teacher", "RoutedTeacher", "--model.teacher.teachers", json.dumps(teachers or TEACHERS)]
    few = [item for split in ("train", "val", "test") for item in (f"--data.{split}", str(path))]
    return [*runs.little(root, steps=steps), *few, *chosen, *extra]


def test_a_fit_by_the_program(tmp_path: Path) -> None:
    path, few = named_rows(tmp_path), ["--trainer.limit_test_batches", "1", "--results.max_new_tokens", "2"]
    few += ["--trainer.val_check_interval", "2"]
    assert main(words(tmp_path / "root", path, *few, steps=3)) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "root" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"val/forward_kl/math", "val/forward_kl/code", "val/kd/code", "val/forward_kl"} <= scalars
    assert runs.results(tmp_path / "root")["teacher"]["exact_match"] is None
    again = [
        "fit",
        "--config",
        str(tmp_path / "root" / "config.yaml"),
        "--trainer.default_root_dir",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    one, other = runs.student(tmp_path / "root"), runs.student(tmp_path / "again")
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_a_cached_teacher_among_them(tmp_path: Path) -> None:
    """The cache needs the rows of its own teacher alone."""
    path = named_rows(tmp_path)
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[::2]) + "\n", encoding="utf-8")
    few = [item for split in ("train", "val", "test") for item in (f"--data.{split}", str(own))]
    plain = [*runs.little(tmp_path / "unused")[1:], *few, "--model.teacher", "asset:teacher"]
    assert main(["cache", *plain, "--output", str(tmp_path / "cache"), "--dtype", "float32"]) == 0
    cached = {**TEACHERS, "math": {"class_path": "CachedTeacher", "init_args": {"path": str(tmp_path / "cache")}}}
    assert main(words(tmp_path / "live", path)) == 0
    assert main(words(tmp_path / "read", path, teachers=cached)) == 0
    plans = {}
    for name, teachers in {"live": TEACHERS, "read": cached}.items():
        (tmp_path / f"plan of {name}").mkdir()
        chosen = ["--model.teacher", "RoutedTeacher", "--model.teacher.teachers", json.dumps(teachers)]
        plans[name] = planned(tmp_path / f"plan of {name}", "--world_size", "1", *chosen)
    head, code = 2048 * 256 * 4, plans["live"]["teacher"]["parameters"]
    assert head < plans["read"]["teacher"]["parameters"] < code
    assert plans["read"]["student"] == plans["live"]["student"]
    live, read = runs.student(tmp_path / "live"), runs.student(tmp_path / "read")
    for name in live:
        torch.testing.assert_close(read[name], live[name], atol=1e-4, rtol=0, msg=name)


def test_refusals_of_the_program(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = named_rows(tmp_path, other="history")
    refused(words(tmp_path / "root", path), ["rows.jsonl:2", "teacher_id", "math, code", "history"], capfd)
    main(["preflight", *words(tmp_path / "root", path)[1:]])
    assert "rows.jsonl:2: field 'teacher_id' must be one of math, code" in capfd.readouterr().out
    refused(["cache", *words(tmp_path / "root", path)[1:], "--output", str(tmp_path / "c")], ["one cache"], capfd)
    default = ["--model.teacher.default", "code"]
    assert main(words(tmp_path / "root", path, *default, steps=1)) == 0


def test_preflight_of_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = named_rows(tmp_path, count=48)
    teachers = {"math": "asset:teacher", "code": "asset:teacher", "unused": "asset:teacher"}
    main(["preflight", *words(tmp_path / "root", path, teachers=teachers)[1:]])
    out = capsys.readouterr().out
    assert "no row of train names teacher 'unused'" in out
    assert "memory and time" in out and "Traceback" not in out


def test_rewards_of_several_teachers() -> None:
    """MiniLLM's reward of a token is the log-probability of its row's teacher."""
    teachers = RoutedTeacher({"a": "asset:teacher", "b": "asset:student"})
    source = MiniLLM(0.0, max_new_tokens=4, inner_epochs=2)
    batch = {**rows(4), TEACHER_INDEX: torch.tensor([0, 1, 1, 0])}
    module = fit(Run("asset:student", teachers, responses=source, ce_weight=0.5), split(batch, 2, 2))
    assert all(torch.isfinite(torch.tensor(line["train/loss"])) for line in module.logged)
    with pytest.raises(ValueError, match=r"teacher_share must be 0 .*got RoutedTeacher"):
        fit(Run("asset:student", teachers, responses=MiniLLM(0.2, max_new_tokens=4), ce_weight=0.5), split(batch, 4))


def test_on_policy_rows_keep_their_teacher() -> None:
    batch = {**rows(6), TEACHER_INDEX: torch.tensor([0, 1, 0, 1, 1, 0])}
    seen: list[Tensor] = []

    class Watched(Run):
        def accumulate(self, batch: Batch, *args: Any) -> None:
            seen.append(batch[TEACHER_INDEX])
            super().accumulate(batch, *args)

    teachers = RoutedTeacher({"a": "asset:teacher", "b": "asset:student"})
    module = Watched("asset:student", teachers, responses=OnPolicy(1.0, max_new_tokens=4), ce_weight=0.3)
    fit(module, split(batch, 3, 3))
    assert torch.equal(torch.cat(seen), batch[TEACHER_INDEX])
    assert module.logged[-1]["train/student_share"] == 1


def test_a_plan_counts_every_teacher(tmp_path: Path) -> None:
    """The bytes of several teachers are those of each by itself."""
    found = {}
    several = json.dumps({"a": "asset:teacher", "b": "asset:student"})
    for name, words in {
        "one": ["--model.teacher", "asset:teacher"],
        "other": ["--model.teacher", "asset:student"],
        "both": ["--model.teacher", "RoutedTeacher", "--model.teacher.teachers", several],
    }.items():
        (tmp_path / name).mkdir()
        found[name] = planned(tmp_path / name, "--world_size", "1", *words)
    total = found["one"]["teacher"]["parameters"] + found["other"]["teacher"]["parameters"]
    assert found["both"]["teacher"]["parameters"] == total
    assert found["both"]["student"] == found["one"]["student"]
    assert any("name the 2 teachers" in note for note in found["both"]["notes"])
    assert found["both"]["peak"] > 0


# ---------------------------------------------------------------------------------------------------------------- ranks
def ranked(folder: Path, strategy: Any, rank: int = 0, ranks: int = 1, start: Path | None = None) -> DistillationModule:
    """Three steps; the second of two ranks has no row of the first teacher, nor of the third."""
    torch.manual_seed(0)
    own = SelfTeacher("ema", 0.6)
    student, first, second = tiny("llama"), tiny("llama", hidden_size=48), tiny("gemma2", vocab_size=VOCABULARY + 8)
    teacher = RoutedTeacher({"first": first, "offloaded": OffloadedTeacher(second), "own": own})  # type: ignore[arg-type]
    module = DistillationModule(student, teacher, ce_weight=0.5, optimizer=SGD)
    batch = {**rows(8, VOCABULARY), TEACHER_INDEX: torch.tensor([0, 0, 1, 2, 0, 1, 1, 1])}
    own_rows = split(batch, *{1: [8], 2: [5, 3]}[ranks])[rank]
    train(module, own_rows, folder, start, devices=ranks, strategy=strategy, max_epochs=3)
    return module


def state_of(module: DistillationModule) -> dict[str, Tensor]:
    assert module.teacher_state is not None
    average = {f"average {name}": x for name, x in full_state_dict(module.teacher_state).items()}
    return {**full_state_dict(module.student), **average}


def on_two_ranks(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    found = {}
    for kind, strategy in strategies().items():
        module = ranked(Path(folder) / kind, strategy, rank, 2)
        found[kind] = state_of(module)
        if kind == "fsdp2":
            assert module.teacher is not None
            models: Any = [teacher.model for teacher in module.teacher.members.values()]
            sharded = [all(is_sharded(parameter) for parameter in model.parameters()) for model in models]
            assert sharded == [True, False, True]
    start = Path(folder) / "fsdp2" / "epoch=1.ckpt"
    found["again"] = state_of(ranked(Path(folder) / "again", FSDP2Strategy(), rank, 2, start))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    found = processes.run(on_two_ranks, str(tmp_path / "two"))
    one = state_of(ranked(tmp_path / "one", "auto"))
    for states in found:
        for kind, state in states.items():
            for name, x in one.items():
                torch.testing.assert_close(state[name], x, atol=2e-5, rtol=0, msg=f"{kind} {name}")
        assert all(torch.equal(states["again"][name], x) for name, x in states["fsdp2"].items())
