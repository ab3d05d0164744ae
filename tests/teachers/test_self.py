"""The student as its own teacher: now, as an average over its steps, or as it started."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import processes
import runs
from adapters import stirred
from architectures import VOCABULARY, tiny
from kd_lightning import AdapterOffTeacher, DistillationModule, LoRA, SelfTeacher
from kd_lightning.cli.program import main
from kd_lightning.distributed.dtensor import full_state_dict, local_shard
from kd_lightning.models.lora import add_adapters
from kd_lightning.strategies import FSDP2Strategy
from kd_lightning.teachers.base import generating_model
from plans import planned
from refusals import refused
from sharded_fits import joined, train
from tiny_fits import Batch, Run, fit, rows, split

SGD = functools.partial(torch.optim.SGD, lr=0.5)
STEPS = 4


def own_input(batch: Batch, change: int = 3) -> Batch:
    """The batch with an input of the teacher's own: other tokens in the prompt, the same responses."""
    ids = batch["input_ids"].clone()
    ids[:, :2] = (ids[:, :2] + change) % VOCABULARY
    own = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    return {**batch, **{f"teacher_{name}": column for name, column in own.items()}}


def student(adapters: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = tiny("llama", attention_dropout=0.2, **changes)
    return add_adapters(model, LoRA(r=2, dropout=0.3)) if adapters else model


class Snapshots(L.Callback):
    """The trained parameters after every micro-batch."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.taken.append(trained(module.student))


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(teacher: Any, adapters: bool = False, batches: list[Batch] | None = None, **kwargs: Any) -> Run:
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in ("ce_weight", "optimizer", "reduction")}
    module = Run(
        kwargs.pop("student", None) or student(adapters), teacher, **{"ce_weight": 0.3, "optimizer": SGD, **settings}
    )
    batches = batches or [own_input(batch) for batch in split(rows(8, VOCABULARY), *[2] * STEPS)]
    return fit(module, batches, **kwargs)


def averages(module: Any) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in module.teacher_state.named_tensors()}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_the_average_is_the_slow_loops(adapters: bool) -> None:
    snapshots, start = Snapshots(), student(adapters)
    expected = {name: x.double() for name, x in trained(start).items()}
    teacher = SelfTeacher("ema", 0.8)
    module = run(teacher, student=start, callbacks=[snapshots])
    for taken in snapshots.taken:
        expected = {name: 0.8 * mean + 0.2 * taken[name].double() for name, mean in expected.items()}
    found = averages(module)
    assert found.keys() == expected.keys() == snapshots.taken[-1].keys()
    for name, mean in expected.items():
        torch.testing.assert_close(found[name].double(), mean, atol=1e-6, rtol=0)
    own = dict(teacher.model.named_parameters())
    assert all(torch.equal(own[name], mean) for name, mean in found.items())
    assert any((mean - snapshots.taken[-1][name]).abs().max() > 1e-3 for name, mean in found.items())


def test_one_update_per_step_and_none_in_validation() -> None:
    batches = [own_input(batch) for batch in split(rows(8, VOCABULARY), *[2] * STEPS)]
    module = run(
        SelfTeacher("ema", 0.5),
        batches=batches,
        accumulate_grad_batches=4,
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
    )
    still = averages(module)
    assert all(torch.equal(still[name], x) for name, x in trained(student()).items())
    snapshots, start = Snapshots(), trained(student())
    module = run(
        SelfTeacher("ema", 0.5), batches=batches, validation=batches, accumulate_grad_batches=4, callbacks=[snapshots]
    )
    for name, mean in averages(module).items():
        torch.testing.assert_close(mean, (start[name] + snapshots.taken[-1][name]) / 2)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize(("mode", "decay"), [("live", 0.0), ("frozen", 1.0)])
def test_the_ends_of_the_decay_are_the_other_modes(mode: Any, decay: float, adapters: bool) -> None:
    one = run(SelfTeacher(mode), adapters, gradient_clip_val=1.0)
    other = run(SelfTeacher("ema", decay), adapters, gradient_clip_val=1.0)
    assert [line["train/loss"] for line in one.logged] == [line["train/loss"] for line in other.logged]
    theirs = trained(other.student)
    assert all(torch.equal(x, theirs[name]) for name, x in trained(one.student).items())
    assert any(not torch.equal(x, theirs[name]) for name, x in trained(student(adapters)).items())


def test_frozen_adapters_at_zero_are_the_adapter_off_teacher() -> None:
    teacher = SelfTeacher("frozen")
    one, other = run(teacher, True), run(AdapterOffTeacher(), True)
    assert one.teacher_state is None and teacher.shares_student and generating_model(teacher) is None
    theirs = trained(other.student)
    assert all(torch.equal(x, theirs[name]) for name, x in trained(one.student).items())


def test_frozen_adapters_that_are_not_zero_are_kept() -> None:
    torch.manual_seed(1)
    start = stirred(student(adapters=True))
    before, copied = trained(start), copy.deepcopy(start).eval()
    teacher = SelfTeacher("frozen")
    module = run(teacher, student=start)
    assert all(torch.equal(x, before[name]) for name, x in averages(module).items())
    tokens = rows(2, VOCABULARY)
    with torch.no_grad():
        expected = copied(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    assert torch.equal(teacher.logits(tokens), expected)
    assert (module.student.eval()(input_ids=tokens["input_ids"]).logits - expected).abs().max() > 1e-3


def test_adapters_share_the_weights_under_them() -> None:
    teacher = SelfTeacher("ema")
    module = DistillationModule(student(True), teacher, ce_weight=0.5)
    module.configure_model()
    own, theirs = dict(teacher.model.named_parameters()), dict(module.student.named_parameters())
    for name, parameter in theirs.items():
        assert (own[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
    assert {
        name.split(".", 1)[1].replace("/", ".") for name in module.state_dict() if name.startswith("teacher_state.")
    } == set(trained(module.student))
    model = teacher.model
    module.configure_model()
    assert teacher.model is model


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "roberta"])
def test_it_computes_without_dropout_and_gradient(model_type: str) -> None:
    torch.manual_seed(0)
    model = tiny(model_type, hidden_dropout_prob=0.5) if model_type == "roberta" else tiny(model_type)
    original = copy.deepcopy(model).eval()
    teacher = SelfTeacher("ema")
    module = DistillationModule(model, teacher, ce_weight=0.5)
    module.configure_model()
    assert module.student.training
    tokens = {name: x for name, x in rows(2, VOCABULARY).items() if name != "row_ids"}
    found = teacher.logits(tokens)
    assert not found.requires_grad and torch.equal(found, teacher.logits(tokens))
    with torch.no_grad():
        expected = original(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    assert torch.equal(found, expected)
    assert (teacher.head is None) == (model_type == "roberta")
    assert module.student.training
    assert module.teacher is teacher and generating_model(teacher) is teacher.model


def test_a_half_precision_student_has_an_fp32_average() -> None:
    start = student().to(torch.bfloat16)
    teacher = SelfTeacher("ema", 0.9)
    module = run(teacher, student=start, precision="bf16-true")
    found = averages(module)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    own = dict(teacher.model.named_parameters())
    assert all(torch.equal(own[name], x.bfloat16()) for name, x in found.items())
    assert any(not torch.equal(x.bfloat16().float(), x) for x in found.values())


@pytest.mark.parametrize(("mode", "decay"), [("live", 0.0), ("frozen", 1.0)])
def test_the_ends_of_the_decay_in_half_precision(mode: Any, decay: float) -> None:
    one, other = run(SelfTeacher(mode), precision="bf16-true"), run(SelfTeacher("ema", decay), precision="bf16-true")
    assert next(one.student.parameters()).dtype == torch.bfloat16
    theirs = trained(other.student)
    assert all(torch.equal(x, theirs[name]) for name, x in trained(one.student).items())


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("mode", ["ema", "frozen"])
def test_a_resumed_run_has_the_same_bits(mode: Any, adapters: bool, tmp_path: Path) -> None:
    def steps(root: Path, epochs: int, start: Path | None) -> tuple[dict[str, Tensor], Any]:
        begin = stirred(student(adapters)) if adapters else student()
        module = DistillationModule(begin, SelfTeacher(mode, 0.7), ce_weight=0.3, optimizer=torch.optim.AdamW)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            max_epochs=epochs,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        batches = [own_input(batch) for batch in split(rows(8, VOCABULARY), 4, 4)]
        loader = DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, loader, ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(root)
        return {**trained(module.student), **{f"average {n}": x for n, x in averages(module).items()}}, module

    whole, _ = steps(tmp_path / "whole.ckpt", 3, None)
    steps(tmp_path / "cut.ckpt", 2, None)
    again, _ = steps(tmp_path / "again.ckpt", 3, tmp_path / "cut.ckpt")
    assert all(torch.equal(again[name], x) for name, x in whole.items())
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"]
    held = {name: x for name, x in saved.items() if name.startswith("teacher_state.")}
    assert held and all(isinstance(x, Tensor) for x in held.values())


def test_live_needs_an_input_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"mode='live'.*set data\.teacher_prompt"):
        run(SelfTeacher("live"), batches=split(rows(8, VOCABULARY), 4, 4))


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), True])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\]"):
        SelfTeacher("ema", decay)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="mode must be one of live, ema, frozen, got 'average'"):
        SelfTeacher("average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not attached to a student"):
        SelfTeacher("ema").hidden(rows(2))
    for mode in ("live", "ema"):
        with pytest.raises(ValueError, match=r"teacher_cache must be false: SelfTeacher.*changes with every step"):
            DistillationModule("asset:student", SelfTeacher(mode), teacher_cache=True)  # type: ignore[arg-type]
    model = tiny("llama")
    module = DistillationModule(model, SelfTeacher("ema"))
    module.configure_model()
    from kd_lightning import HFTeacher

    same = DistillationModule(model, HFTeacher(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two objects"):
        same.configure_model()


# --------------------------------------------------------------------------------------------------------- the program
def words(mode: str, *extra: str) -> list[str]:
    return ["--model.teacher", "SelfTeacher", "--model.teacher.mode", mode, *extra]


@pytest.mark.parametrize("mode", ["ema", "frozen"])
@pytest.mark.parametrize("setup", ["plain", "bf16-true", "lora", "fsdp2", "fsdp2, lora"])
def test_a_plan_counts_the_average(setup: str, mode: str, tmp_path: Path) -> None:
    extra = {
        "plain": ["--world_size", "1"],
        "bf16-true": ["--world_size", "1", "--trainer.precision", "bf16-true"],
        "lora": ["--world_size", "1", "--model.lora.r", "4"],
        "fsdp2": ["--world_size", "2", "--trainer.strategy", "fsdp2"],
        "fsdp2, lora": ["--world_size", "2", "--trainer.strategy", "fsdp2", "--model.lora.r", "4"],
    }[setup]
    plan = planned(tmp_path, *words(mode), *extra)
    student, teacher = (plan[role]["parameters"] for role in ("student", "teacher"))
    if "lora" not in setup:
        assert teacher == {"plain": student, "bf16-true": 3 * student, "fsdp2": student}[setup]  # bf16 next to fp32
    elif mode == "frozen":
        assert teacher == 0
    else:
        trainable = plan["student"]["gradients"]
        assert teacher == (trainable if setup == "lora" else student)
    assert plan["peak"] > 0


@pytest.mark.parametrize(
    ("mode", "weight", "said"),
    [
        ("live", "0.0", "error: routing: teacher SelfTeacher(mode='live') is the student itself"),
        ("ema", "0.0", "error: teacher: it starts as the student and reads the same input"),
        ("frozen", "0.5", "note: step: memory and time"),
    ],
)
def test_preflight(mode: str, weight: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.little_data(tmp_path, rows=48)
    common = [*runs.little(tmp_path / "root")[1:], "--data.train", str(data), "--model.ce_weight", weight]
    main(["preflight", *common, "--data.val", "asset:validation", *words(mode)])
    found = capsys.readouterr().out
    assert said in found and ("error: teacher:" in found) == (mode == "ema")


def test_the_program_refuses_what_cannot_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = [*runs.little(tmp_path / "root"), "--data.train", str(runs.little_data(tmp_path))]
    refused([*common, *words("live")], ["SelfTeacher(mode='live')", "set data.teacher_prompt"], capfd)
    refused(
        [*common, *words("ema", "--model.teacher.decay", "1.5")], ["decay must be a number in [0, 1]", "1.5"], capfd
    )
    refused([*common, *words("often")], ["mode"], capfd)
    cache = ["cache", *common[1:], *words("ema"), "--output", str(tmp_path / "cache")]
    refused(cache, ["changes with every step"], capfd)


def test_export_and_another_command(tmp_path: Path) -> None:
    common = [*runs.little(tmp_path / "root", test=True), "--data.train", str(runs.little_data(tmp_path))]
    common += ["--trainer.limit_test_batches", "1", "--results.max_new_tokens", "2", "--model.ce_weight", "0.5"]
    assert main([*common, *words("ema")]) == 0
    exported, saved = (
        runs.student(tmp_path / "root"),
        torch.load(tmp_path / "root/checkpoints/last.ckpt", weights_only=True),
    )
    assert not any("teacher" in name for name in exported)
    held = [name for name in saved["state_dict"] if name.startswith("teacher_state.")]
    assert len(held) == sum(
        1 for name in saved["state_dict"] if name.startswith("model.student.") and "lm_head" not in name
    )
    assert main(["validate", *common[1:], *words("ema"), "--ckpt_path", "last"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_killed_and_resumed_equals_untouched(adapters: bool, tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=45)
    few = ["--data.batch_size", "4", "--checkpoint.every_n_train_steps", "5", "--data.train", str(data)]
    few += ["--model.ce_weight", "0.5", *words("ema", "--model.teacher.decay", "0.9")]
    few += ["--model.lora.r", "4"] if adapters else []
    assert main([*runs.little(tmp_path / "whole", steps=120), *few]) == 0
    cut = [*runs.little(tmp_path / "cut", steps=120), *few]
    runs.kill_when(cut, tmp_path / "cut" / "checkpoints" / "last.ckpt")
    code, _, err = runs.finish([*cut, "--ckpt_path", "last"])
    assert code == 0, err
    whole, again = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert whole.keys() == again.keys() and any(name.startswith("teacher_state.") for name in whole)
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


# ---------------------------------------------------------------------------------------------------------------- ranks
RANKED: dict[str, dict[str, Any]] = {
    "ema": {"teacher": ("ema", 0.6)},
    "live": {"teacher": ("live", 0.6)},
    "frozen": {"teacher": ("frozen", 0.6)},
    "adapters": {"teacher": ("ema", 0.6), "adapters": True},
}


def ranked(folder: Path, name: str, strategy: Any, rank: int = 0, ranks: int = 1, start: Path | None = None) -> Any:
    """Three steps, with a checkpoint of each."""
    torch.manual_seed(0)
    setup = RANKED[name]
    begin = tiny("llama", tie_word_embeddings=True)
    begin = stirred(add_adapters(begin, LoRA(r=2))) if setup.get("adapters") else begin
    module = DistillationModule(begin, SelfTeacher(*setup["teacher"]), ce_weight=0.5, optimizer=SGD)
    batch = split(own_input(rows(8, VOCABULARY)), *{1: [8], 2: [5, 3]}[ranks])[rank]
    train(module, batch, folder, start, devices=ranks, strategy=strategy, max_epochs=3)
    return module


def state_of(module: Any) -> dict[str, Tensor]:
    found = {f"student {name}": x for name, x in full_state_dict(module.student).items()}
    average = {} if module.teacher_state is None else full_state_dict(module.teacher_state)
    return {**found, **{f"average {name}": x for name, x in average.items()}}


def on_two_ranks(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    found = {}
    for name in RANKED:
        for kind, strategy in {
            "ddp": "ddp",
            "fsdp2": FSDP2Strategy(),
            "cut": FSDP2Strategy(save_distributed_checkpoint=True),
        }.items():
            root = Path(folder) / name / kind
            module = ranked(root, name, strategy, rank, 2)
            found[f"{name} {kind}"] = state_of(module)
            if kind == "fsdp2" and module.teacher_state is not None:
                parts = [(local_shard(x).numel(), x.numel()) for x in module.teacher_state.parameters()]
                assert sum(own for own, _ in parts) < 0.6 * sum(whole for _, whole in parts)
        again = ranked(Path(folder) / name / "again", name, FSDP2Strategy(), rank, 2, root / "epoch=1.ckpt")
        found[f"{name} again"] = state_of(again)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_two_ranks_are_one_process_and_resume(tmp_path: Path) -> None:
    close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=0)
    first, second = processes.run(on_two_ranks, str(tmp_path / "two"))
    for name in RANKED:
        one = state_of(ranked(tmp_path / name, name, "auto"))
        assert any(key.startswith("average") for key in one) == (name != "live")
        for kind in ("ddp", "fsdp2", "cut", "again"):
            for found in (first, second):
                for key, x in one.items():
                    torch.testing.assert_close(
                        found[f"{name} {kind}"][key], x, atol=2e-5, rtol=0, msg=f"{name} {kind} {key}"
                    )
                    assert torch.equal(found[f"{name} again"][key], found[f"{name} cut"][key]), f"{name} {key}"
        other = state_of(
            ranked(tmp_path / f"{name} again", name, "auto", start=tmp_path / "two" / name / "cut" / "epoch=1.ckpt")
        )
        for key, x in one.items():
            close(other[key], x)


# ------------------------------------------------------------------------------------------------------ an own input
def hinted(folder: Path, rows: int = 24) -> Path:
    """Rows whose teacher may read the answer."""
    path = runs.little_data(folder, rows)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(json.dumps({**row, "hint": row["output"]}, ensure_ascii=False) for row in found)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def run_by_the_program(root: Path, data: Path, *extra: str) -> dict[str, Tensor]:
    sources = [item for split in ("train", "val") for item in (f"--data.{split}", str(data))]
    prompt = ["--data.teacher_prompt", "{prompt} The answer is {hint}"]
    few = ["--data.test", "null", "--trainer.val_check_interval", "2"]
    assert main([*runs.little(root, steps=3), *sources, *prompt, *few, *extra]) == 0
    return runs.student(root)


def test_runs_that_read_an_input_of_their_own(tmp_path: Path) -> None:
    """Live and decay 0, frozen and decay 1 are the same runs, on the data's responses and on the student's."""
    data, found = hinted(tmp_path), {}
    policy = ["--model.responses", "OnPolicy", "--model.responses.share", "1", "--model.responses.max_new_tokens", "4"]
    modes = {"live": ("live", "0.5"), "zero": ("ema", "0"), "frozen": ("frozen", "0.5"), "one": ("ema", "1")}
    for name, (mode, decay) in modes.items():
        chosen = words(mode, "--model.teacher.decay", decay)
        found[name] = run_by_the_program(tmp_path / name, data, *chosen, *(policy if name in ("live", "zero") else []))
    for one, other in (("live", "zero"), ("frozen", "one")):
        assert all(torch.equal(x, found[other][name]) for name, x in found[one].items())
    assert any(not torch.equal(x, found["frozen"][name]) for name, x in found["live"].items())


def test_a_plan_of_a_live_teacher(tmp_path: Path) -> None:
    own = ["--data.teacher_prompt", "{prompt} The answer is {output}"]
    plan = planned(tmp_path, *words("live"), *own, "--world_size", "2", "--trainer.strategy", "fsdp2")
    assert plan["teacher"]["parameters"] == 0 and plan["peak"] > 0
    with pytest.raises(ValueError, match=r"set data\.teacher_prompt"):
        planned(tmp_path, *words("live"), "--world_size", "1")


def test_preflight_of_a_live_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = hinted(tmp_path, rows=48)
    sources = ["--data.train", str(data), "--data.val", "null", "--data.test", "null"]
    sources += ["--data.teacher_prompt", "{prompt} The answer is {hint}"]
    main(["preflight", *runs.little(tmp_path / "root")[1:], *sources, *words("live")])
    out = capsys.readouterr().out
    assert "error: routing" not in out and "reads the same input" not in out
    assert "memory and time" in out and "the answer is" in out.lower()
