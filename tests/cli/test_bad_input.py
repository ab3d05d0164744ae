"""Bad input is refused before step 0 with one line that names it, and existing files stay unchanged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from refusals import refused

ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "temperature 0": (["--model.temperature", "0"], ["temperature", "got 0.0", "[0.001, 1000]"]),
    "temperature negative": (["--model.temperature=-1"], ["temperature", "-1"]),
    "ce_weight above 1": (["--model.ce_weight", "1.5"], ["ce_weight", "1.5"]),
    "ce_weight below 0": (["--model.ce_weight=-0.1"], ["ce_weight", "-0.1"]),
    "beta at its end": (
        ["--model.objective", "GeneralizedJSD", "--model.objective.beta", "1.0"],
        ["beta", "1", "ReverseKL", "ForwardKL"],
    ),
    "skew at its end": (["--model.objective", "SkewKL", "--model.objective.alpha", "1.0"], ["alpha", "1"]),
    "misspelt class": (
        ["--model.objective", "FowardKL"],
        ["objective", "unknown class FowardKL (did you mean ForwardKL?)"],
    ),
    "missing custom class": (
        ["--model.objective", "test_bad_input.Nope"],
        ["model.objective: test_bad_input.Nope cannot be imported from /", "has no attribute 'Nope'"],
    ),
    "missing custom file": (
        ["--model.objective", "nowhere.Mine"],
        ["model.objective: nowhere.Mine cannot be imported from /", "No module named 'nowhere'"],
    ),
    "unknown trainer block": (["--trainer", "dpd"], ["--trainer dpd", "cpu, ddp, fsdp2"]),
    "misspelt monitor": (
        ["--model.monitors", '{"mine": "FowardKL"}'],
        [
            "model.monitors",
            "unknown class FowardKL (did you mean ForwardKL?): pass one of AMiD, AdaptiveKL",
            "ForwardKL",
        ],
    ),
    "misspelt argument": (["--model.temprature", "2"], ["temprature"]),
    "misspelt argument of a class": (
        ["--model.objective", "GeneralizedJSD", "--model.objective.bta", "0.4"],
        ["bta"],
    ),
    "misspelt argument of the data": (["--data.batchsize", "3"], ["batchsize", "did you mean batch_size?"]),
    "learning rate that is not a number": (
        ["--model.optimizer.lr", "abc"],
        ["model.optimizer.lr must be float, got 'abc'"],
    ),
    "unknown argument of an optimizer": (
        ["--model.optimizer.foo", "3"],
        ["AdamW has no argument 'foo': pass one of params, lr"],
    ),
    "abbreviated argument": (["--trainer.max_step", "7"], ["--trainer.max_step 7 (did you mean --trainer.max_steps?)"]),
    "misspelt middle": (["--model.optimiser.lr", "1"], ["(did you mean --model.optimizer.lr?)"]),
    "argument unlike any other": (["--zzz", "1"], ["--zzz 1: --help lists the arguments"]),
    "argument without its class": (
        ["--model.objective", "TAID", "--model.objective.teacher_weight.step_size", "0.01"],
        [
            "missing class for --model.objective.teacher_weight: pass --model.objective.teacher_weight CLASS (one of ",
            "Cosine, ",
            "Linear, ",
            "ResponseGap, TAIDSchedule)",  # between them the schedules that other tests define
        ],
    ),
    "misspelt argument in a file": (
        ["--config", '{"trainer": {"max_step": 7}}'],
        ["(did you mean trainer.max_steps?)"],
    ),
    "wrongly typed argument": (["--model.temperature", "warm"], ["temperature", "warm"]),
    "reduction": (["--model.reduction", "mean"], ["reduction", "mean", "token_mean"]),
    "batch size 0": (["--data.batch_size", "0"], ["batch_size", "0"]),
    "max_length too small": (["--data.max_length", "3"], ["max_length", "3"]),
    "missing student": (["--model.student", "/nowhere/student"], ["student", "/nowhere/student"]),
    "missing teacher": (["--model.teacher", "/nowhere/teacher"], ["teacher", "/nowhere/teacher"]),
    "misspelt teacher class": (["--model.teacher", "HFTeachr"], ["HFTeachr", "HFTeacher"]),
    "unknown asset": (["--data.train", "asset:trian"], ["asset:trian", "asset:train"]),
    "missing data": (["--data.train", "/nowhere/train.jsonl"], ["/nowhere/train.jsonl"]),
    "missing checkpoint": (["--ckpt_path", "/nowhere/a.ckpt"], ["ckpt_path", "/nowhere/a.ckpt"]),
    "no last checkpoint": (["--ckpt_path", "last"], ["ckpt_path", "last"]),
    "fsdp": (["--trainer.strategy", "fsdp"], ["fsdp", "fsdp2"]),
    "student_init": (["--model.student_init", "zeros"], ["student_init", "zeros", "pretrained", "random"]),
    "no teacher": (["--model.teacher", "null"], ["ce_weight", "teacher"]),
    "trust_remote_code": (["--model.student_kwargs", '{"trust_remote_code": true}'], ["trust_remote_code"]),
    "unknown config": (["--config", "quikstart"], ["quikstart", "(did you mean quickstart?)"]),
}


@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument(case: tuple[list[str], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, said = case
    refused([*runs.little(tmp_path / "root"), *words], said, capfd)
    assert not (tmp_path / "root" / "student").exists()
    assert not (tmp_path / "root" / "config.yaml").exists()


def test_a_misspelt_command(capfd: pytest.CaptureFixture[str]) -> None:
    refused([], ["missing command: pass one of fit, ", "preflight"], capfd)
    refused(
        ["prefligth", "--config", "quickstart"],
        ["unknown command 'prefligth' (did you mean preflight?)", "fit", "plan"],
        capfd,
    )


ROW = json.dumps({"instruction": "a", "output": "b"})
FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["empty"]),
    "broken": (f"{ROW}\n{{broken\n".encode(), ["2"]),
    "not UTF-8": (f"{ROW}\n".encode() + b'{"instruction": "\xff", "output": "b"}\n', ["2", "UTF-8"]),
    "wrongly typed": (f'{ROW}\n{ROW}\n{{"instruction": 3, "output": "b"}}\n'.encode(), ["3", "instruction"]),
    "without fields": (f'{ROW}\n{{"question": "a"}}\n'.encode(), ["2", "question"]),
    "no token with a label": (b'{"instruction": "a", "output": ""}\n', ["answer"]),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
def test_a_bad_file(case: tuple[bytes, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, said = case
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    refused([*runs.little(tmp_path / "root"), "--data.train", str(path)], ["rows.jsonl", *said], capfd)


def changed_model(source: str, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a bundled model with other weights."""
    shutil.copytree(resolve(source), target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(role: str, bad: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = bad

    folder = changed_model(f"asset:{role}", tmp_path / "model", spoil)
    said = [role, "model.layers.1.mlp.up_proj.weight"]
    refused([*runs.little(tmp_path / "root"), f"--model.{role}", str(folder)], said, capfd)


def test_another_tokenizer_is_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(resolve("asset:teacher"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = (next(token for token, i in vocab.items() if i == wanted) for wanted in (300, 301))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert main([*runs.little(tmp_path / "root", steps=1), "--model.teacher", str(folder)]) == 0
    assert "teacher and student have two tokenizers: 2045 of the student's 2048 tokens" in caplog.text


def test_folder_without_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "student"
    shutil.copytree(resolve("asset:student"), folder)
    (folder / "model.safetensors").unlink()
    words = [*runs.little(tmp_path / "root", steps=1), "--model.student", str(folder)]
    refused(words, ["student_init", "random", str(folder)], capfd)
    assert main([*words, "--model.student_init", "random"]) == 0


def test_a_foreign_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.ckpt"
    for content in (b"not a checkpoint", None):
        if content is None:
            torch.save({"state_dict": {"layer.weight": torch.ones(1)}}, foreign)
        else:
            foreign.write_bytes(content)
        refused([*runs.little(tmp_path / "root"), "--ckpt_path", str(foreign)], ["foreign.ckpt"], capfd)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_or_objective(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert main(runs.little(root, steps=1)) == 0
    on = [*runs.little(root, steps=2), "--ckpt_path", "last"]
    for other in (["--model.student", "asset:teacher"], ["--model.lora.r", "2"], ["--model.objective", "TAID"]):
        line = refused([*on, *other], ["the checkpoint belongs to another model or objective"], capfd)
        assert len(line) < 320, line


def test_a_fresh_run_into_a_finished_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert main(runs.little(root, steps=1)) == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    refused([*runs.little(root, steps=2), "--model.temperature", "2"], [str(root / "student"), "overwrite"], capfd)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert main([*runs.little(root, steps=2), "--export.overwrite", "true"]) == 0
    assert any(not torch.equal(a, b) for a, b in zip(runs.student(root).values(), _weights(before, root), strict=True))


def _weights(files: dict[Path, bytes], root: Path) -> list[torch.Tensor]:
    from safetensors.torch import load

    return list(load(files[root / "student" / "model.safetensors"]).values())


def test_a_root_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "root"
    refused(runs.little(root), [str(root), "cannot be written"], capfd)


def test_a_full_disk_keeps_the_last_complete_checkpoint(tmp_path: Path) -> None:
    with runs.small_disk(tmp_path, "8m") as disk:
        words = [*runs.little(disk / "root", steps=40), "--checkpoint.every_n_train_steps", "1"]
        code, _, err = runs.finish([*words, "--checkpoint.save_top_k=-1"])
        assert code == 1, err
        assert "kd-lightning: error:" in err
        assert "No space left" in err
        assert "Traceback" not in err
        last = torch.load(disk / "root" / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] >= 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    words = [*runs.little(root, steps=30), "--model.optimizer.lr", "1e30", "--trainer.gradient_clip_val", "null"]
    line = refused([*words, "--checkpoint.every_n_train_steps", "1"], ["loss", "step", "rows"], capfd)
    assert "nan" in line or "inf" in line
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] >= 1
    assert not (root / "student").exists()
