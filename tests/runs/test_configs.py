"""Every shipped config runs, shortened, and writes the files of a run."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
from kd_lightning.cli.program import main
from kd_lightning.reporting.run_dir import RunFolder

CONFIGS = sorted(path.stem for path in runs.CONFIGS.glob("*.yaml"))
SAVED = sorted((Path(__file__).parent / "saved_configs").glob("*.yaml"))  # `config.yaml` of runs of earlier versions
VALIDATION = ("kd", "ce", "forward_kl", "reverse_kl", "jsd", "total_variation", "teacher_nll", "agreement")


def scalars(root: Path) -> dict[str, list[float]]:
    """All scalars of the run's event files."""
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    often = ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    train = [
        "--data.train",
        str(runs.little_data(tmp_path, config=name)),
    ]  # some configs generate responses to all of it first
    assert main([*runs.little(root, name, steps=3), *often, *train]) == 0
    found = scalars(root)
    logged = {f"val/{key}" for key in VALIDATION} | {"train/loss", "train/kd", "train/ce", "train/student_share"}
    if name in ("sft", "seqkd"):
        logged.remove("train/kd")  # with ce_weight 1 the teacher is not run in training
    if name == "taid":
        logged.add("schedule/assistant.teacher_weight")
    assert logged <= found.keys()
    assert all(torch.tensor(values).isfinite().all() for key, values in found.items() if "/" in key)

    student = AutoModelForCausalLM.from_pretrained(root / "student")
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Define the noun below.\ncat"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = student.generate(**prompt, max_new_tokens=4)
    assert written.shape[1] > prompt["input_ids"].shape[1]

    assert len({file.stat().st_mode for file in (root / "student").iterdir()}) == 1  # the same permissions
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    parameters = sum(p.numel() for p in student.parameters())
    state = {key: t for key, t in checkpoint["state_dict"].items() if "lora_" not in key}  # merged in the export
    kept = sum(t.numel() for key, t in state.items() if key.startswith("model.") and t.numel() > 1)
    assert kept <= parameters + student.lm_head.weight.numel()  # tied weights have two names; no teacher


def test_the_results_table(tmp_path: Path) -> None:
    root = tmp_path / "root"
    words = runs.little(root, steps=2, test=True)
    assert main([*words, "--trainer.limit_test_batches", "3"]) == 0
    table = runs.results(root)
    assert list(table) == ["teacher", "student_before", "student_after"]
    for row in table.values():
        assert set(row) == {"nll", "forward_kl", "exact_match"}
    assert table["teacher"]["forward_kl"] == 0
    assert table["teacher"]["nll"] < table["student_before"]["nll"]
    assert table["student_after"]["nll"] != table["student_before"]["nll"]


def test_config_yaml_repeats_the_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*runs.little(first, "amid", steps=3), "--model.optimizer.lr", "1e-3", "--seed_everything", "7"]) == 0
    assert main(["fit", "--config", str(first / "config.yaml"), "--trainer.default_root_dir", str(second)]) == 0
    a, b = runs.student(first), runs.student(second)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_config_that_an_earlier_version_saved_still_runs(path: Path, tmp_path: Path) -> None:
    root, train = tmp_path / "root", runs.little_data(tmp_path)
    words = ["fit", "--config", str(path), "--trainer.default_root_dir", str(root), "--data.train", str(train)]
    assert main([*words, *runs.QUIET, "--trainer.max_steps", "2"]) == 0
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    saved, again = RunFolder.read(path_as_run(path, tmp_path)), RunFolder.read(root)
    changed = {"data.train", "trainer.enable_progress_bar"}
    assert {name for name in saved.method if saved.method[name] != again.method.get(name)} <= changed
    assert "kd_lightning.replay." not in (root / "config.yaml").read_text()


def path_as_run(config: Path, folder: Path) -> Path:
    """A folder that holds this `config.yaml` alone."""
    (folder / "earlier").mkdir()
    shutil.copy(config, folder / "earlier" / "config.yaml")
    return folder / "earlier"


def test_print_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["fit", *words, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = printed("--config", "taid", "--model.temperature", "2.0")
    (tmp_path / "printed.yaml").write_text(text)
    assert yaml.safe_load(printed("--config", str(tmp_path / "printed.yaml"))) == yaml.safe_load(text)


def test_the_best_student_is_exported(tmp_path: Path) -> None:
    root = tmp_path / "root"
    # teacher_nll is constant and only a lower value is better, so the first validation is the best; forward_kl falls
    words = [*runs.little(root, steps=6), "--export.which", "best", "--trainer.val_check_interval", "2"]
    assert main([*words, "--export.monitor", "val/teacher_nll"]) == 0
    best = torch.load(root / "checkpoints" / "best.ckpt", weights_only=True)
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert best["global_step"] < last["global_step"] == 6
    for name, tensor in runs.student(root).items():
        assert torch.equal(tensor, best["state_dict"][f"model.student.{name}"])
        assert tensor.ndim == 1 or not torch.equal(tensor, last["state_dict"][f"model.student.{name}"])


def test_validate_test_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert main(runs.little(root, steps=2)) == 0
    common = ["--config", "quickstart", "--trainer.default_root_dir", str(root), *runs.CPU, *runs.QUIET]
    for verb in ("validate", "test"):
        limit = {"validate": "val", "test": "test"}[verb]
        words = [verb, *common, f"--trainer.limit_{limit}_batches", "1", "--ckpt_path", "last"]
        assert main(words) == 0
        assert f"{limit}/forward_kl" in capsys.readouterr().out
    assert main(["predict", *common, "--trainer.limit_predict_batches", "2", "--ckpt_path", "last"]) == 0
    lines = (root / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 64
    first = yaml.safe_load(lines[0])
    assert {"instruction", "input", "output", "response"} <= first.keys()


def test_the_length_of_predictions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    common = ["predict", "--config", "quickstart", "--trainer.default_root_dir", str(root), *runs.CPU, *runs.QUIET]
    common += ["--trainer.limit_predict_batches", "1", "--data.batch_size", "8"]

    def predictions(*more: str) -> list[str]:
        caplog.clear()
        assert main([*common, *more]) == 0
        lines = (root / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [yaml.safe_load(line)["response"] for line in lines]

    responses = predictions()
    assert len(responses) == 8
    assert "were cut" not in caplog.text
    short = predictions("--predictions.max_new_tokens", "2")
    assert "4 of 8 responses were cut at 2 tokens: raise --predictions.max_new_tokens" in caplog.text
    assert all(response.startswith(begin) for response, begin in zip(responses, short, strict=True))
    assert sum(response != begin for response, begin in zip(responses, short, strict=True)) == 4
    assert predictions("--predictions.max_new_tokens", "64") == responses
    assert main([*common, "--predictions.max_new_tokens", "0"]) == 1
    assert "max_new_tokens must be at least 1, got 0" in capsys.readouterr().err


def test_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = runs.little(Path("root"), steps=1)
    words[words.index("--config") + 1] = "quickstart"
    assert main(words) == 0
    assert (tmp_path / "root" / "student" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "root")


def test_a_custom_class_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_divergence.py").write_text(
        "from kd_lightning import Divergence\n\n\n"
        "class SquaredHellinger(Divergence):\n"
        "    def forward(self, log_p, log_q):\n"
        "        return 1 - ((log_p + log_q) / 2).exp().sum(-1)\n"
    )
    words = [*runs.little(tmp_path / "root", steps=1), "--model.objective", "my_divergence.SquaredHellinger"]
    program = (
        "-c",
        "import sys; sys.path.remove(''); from kd_lightning.cli import main; sys.exit(main())",
    )  # a script's
    process = runs.start([*words, "--data.train", str(runs.little_data(tmp_path))], program, cwd=tmp_path)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
