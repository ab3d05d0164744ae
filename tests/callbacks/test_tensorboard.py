"""Baselines of a run, and its TensorBoard dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

import runs
from kd_lightning.callbacks.tensorboard import BINS, CHARTS, POSITIONS, Dashboard
from kd_lightning.cli.program import main
from kd_lightning.reporting.run_dir import RunFolder

VALIDATED = ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, and an earlier one as its baseline."""
    folder = tmp_path_factory.mktemp("runs")
    data = ["--data.train", str(runs.little_data(folder)), *VALIDATED]
    assert main([*runs.little(folder / "sft", "sft"), *data]) == 0
    assert main([*runs.little(folder / "run", "taid"), *data, "--baseline", str(folder / "sft")]) == 0
    return folder


def events(root: Path) -> Any:
    accumulator = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_baselines_are_constant_lines_from_the_first_step_to_the_last(root: Path) -> None:
    run, sft = RunFolder.read(root / "run"), RunFolder.read(root / "sft")
    for name in ("teacher_nll", "student_before_nll", "student_before_forward_kl", "run_nll", "run_forward_kl"):
        curve = run.scalars[f"baseline/{name}"]
        assert [step for step, _ in curve] == [0, 2, 4] and len({value for _, value in curve}) == 1, name
    assert run.last("baseline/run_nll") == sft.last("val/ce")
    assert run.last("baseline/teacher_nll") == pytest.approx(run.last("val/teacher_nll"), rel=1e-6)


def test_the_layout_names_scalars_that_are_there(root: Path) -> None:
    found = set(RunFolder.read(root / "run").scalars)
    for title, tags in CHARTS.items():
        for tag in tags:
            assert any(name == tag or (tag.endswith("*") and name.startswith(tag[:-2])) for name in found), (title, tag)
    assert "custom_scalars__config__" in events(root / "run").Tags()["tensors"]


def test_figures_and_the_config_as_text(root: Path) -> None:
    accumulator = events(root / "run")
    parts = "forward KL on the top and the tail of the teacher"
    for name in ("agreement by position in the response", "probability of the label", parts):
        assert [image.step for image in accumulator.Images(f"validation/{name}")] == [2, 4]
    text = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "max_steps: 4" in text


def test_hyperparameters_come_with_final_metrics_and_no_scalar_is_invented(root: Path) -> None:
    accumulator = events(root / "run")
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["model.temperature"].number_value == 1.0
    assert "hp_metric" not in accumulator.Tags()["scalars"]
    assert all(curve[0][0] > 0 for name, curve in RunFolder.read(root / "run").scalars.items() if name[:4] == "val/")


class Module:
    device = torch.device("cpu")


def test_sums_of_the_figures_equal_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    dashboard, position_sums, pairs = Dashboard(""), torch.zeros(4, POSITIONS), torch.zeros(BINS, BINS)
    dashboard.on_validation_epoch_start(None, Module())  # type: ignore[arg-type]
    for _ in range(3):
        labels = torch.randint(5, (4, 50), generator=generator)
        labels[torch.rand(4, 50, generator=generator) < 0.3] = -100
        count = int((labels[:, 1:] != -100).sum())
        values = {
            name: torch.rand(count, generator=generator) * 3 for name in ("teacher_nll", "ce", "forward_kl", "head_kl")
        }
        values["agreement"] = (torch.rand(count, generator=generator) < 0.5).float()
        dashboard.on_validation_batch_end(None, Module(), values, {"labels": labels})  # type: ignore[arg-type]
        n = 0
        for row in labels[:, 1:].tolist():
            position = 0
            for label in row:
                if label == -100:
                    continue
                sums = [1.0, *(float(values[name][n]) for name in ("agreement", "forward_kl", "head_kl"))]
                position_sums[:, min(position, POSITIONS - 1)] += torch.tensor(sums)
                theirs, ours = (int(float((-values[name][n]).exp()) * BINS) for name in ("teacher_nll", "ce"))
                pairs[min(theirs, BINS - 1), min(ours, BINS - 1)] += 1
                position, n = position + 1, n + 1
    torch.testing.assert_close(dashboard._by_position, position_sums)
    assert torch.equal(dashboard._probabilities, pairs)


def test_another_logger_falls_back_quietly(tmp_path: Path) -> None:
    data = ["--data.train", str(runs.little_data(tmp_path)), *VALIDATED]
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "csv")]
    assert main([*runs.little(tmp_path / "root"), *data, *logger]) == 0
    assert "baseline/teacher_nll" in next(tmp_path.rglob("metrics.csv")).read_text()


class Service(Logger):
    """A logger like those of wandb or MLflow, without the methods of TensorBoard's writer."""

    seen: ClassVar[dict[str, list[tuple[int | None, float]]]] = {}
    name, version = "service", "0"

    @property
    def experiment(self) -> Any:
        return object()  # with none of the methods of TensorBoard's writer

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.seen.setdefault(name, []).append((step, float(value)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        assert not args and not kwargs, "no metrics at step 0"


def test_a_service_gets_every_number_and_is_asked_for_nothing_else(tmp_path: Path) -> None:
    Service.seen.clear()
    data = ["--data.train", str(runs.little_data(tmp_path)), *VALIDATED, "--trainer.logger", "test_tensorboard.Service"]
    words = ["--generation.every_n_validations", "1", "--generation.rows", "2", "--generation.max_new_tokens", "2"]
    assert main([*runs.little(tmp_path / "root", "taid"), *data, *words]) == 0
    for tag in ("train/loss", "train/kd", "train/grad_norm", "component/head_kl", "val/forward_kl", "val/rouge_l"):
        assert [step for step, _ in Service.seen[tag]][-1] in (3, 4), tag
    assert len({value for _, value in Service.seen["baseline/teacher_nll"]}) == 1
    assert all(step for name, curve in Service.seen.items() if name.startswith("val/") for step, _ in curve)


def test_no_metric_has_a_point_before_it_was_measured(root: Path) -> None:
    """Read from the raw records, where TensorBoard's hyperparameters would leave a zero."""
    (file,) = (root / "run" / "tensorboard").glob("events.out.tfevents.*")
    points: dict[str, list[tuple[int, float]]] = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars" or value.tag in points:
                points.setdefault(value.tag, []).append((event.step, float(make_ndarray(value.tensor))))
    measured = {name: curve for name, curve in points.items() if name.startswith(("val/", "test/"))}
    assert measured and all(step > 0 for curve in measured.values() for step, _ in curve)
    assert points["val/ce"] == RunFolder.read(root / "run").scalars["val/ce"]
    assert "hp_metric" not in points


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--baseline", "nowhere"], "nowhere is not the folder of a run: it has no config.yaml"),
        (["--baseline", "{root}/run", "--data.val", "asset:test"], "was validated on asset:validation, 400 rows with"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused(
    change: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(root=root) for word in change]
    assert main([*runs.little(tmp_path / "new"), "--data.train", str(runs.little_data(tmp_path)), *words]) == 1
    assert message in capsys.readouterr().err
