"""Every shipped trainer block runs with every shipped config, on two gloo ranks."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import processes
import runs
from kd_lightning.cli.program import main
from sharded_fits import joined

CONFIGS = sorted(path.stem for path in runs.CONFIGS.glob("*.yaml"))
BLOCKS = sorted(path.stem for path in (runs.CONFIGS / "trainer").glob("*.yaml"))
# Refused before step 0 with one line, which is part of what is tested: block, config, what the line says.
REFUSED = {("fsdp2", "minillm"): "teacher_share must be 0 if the strategy shards the teacher (fsdp2): use ddp"}
SHORT = {
    "trainer.accelerator": "cpu",
    "trainer.devices": "2",
    "trainer.max_steps": "2",
    "trainer.val_check_interval": "1",
    "trainer.num_sanity_val_steps": "1",
    "trainer.limit_val_batches": "1",
    "trainer.limit_test_batches": "1",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "data.batch_size": "4",
    "results.max_new_tokens": "4",
    "results.batch_size": "4",
    "generation.every_n_validations": "2",
    "generation.rows": "4",
    "generation.max_new_tokens": "4",
    "generation.seeds": "1",
}


def fit(rank: int, block: str, names: list[str], folder: str) -> dict[str, int]:
    """Exit status by config."""
    joined(rank, 2)
    status = {}
    for name in names:
        words = ["fit", "--config", str(runs.CONFIGS / f"{name}.yaml")]
        words += ["--trainer", str(runs.CONFIGS / "trainer" / f"{block}.yaml")]
        words += [word for key, value in SHORT.items() for word in (f"--{key}", value)]
        words += ["--trainer.default_root_dir", str(Path(folder) / name), "--data.train", f"{folder}/train.jsonl"]
        status[name] = main(words)
    return status


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_trainer_block_with_a_config(
    block: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.little_data(tmp_path, rows=16, config=name)
    statuses = processes.run(fit, block, [name], str(tmp_path))
    err = capfd.readouterr().err
    if (block, name) in REFUSED:
        assert [status[name] for status in statuses] == [1, 1]
        assert REFUSED[block, name] in err and "Traceback" not in err
        return
    assert [status[name] for status in statuses] == [0, 0], err
    root = tmp_path / name
    table = json.loads((root / "results.json").read_text())
    assert all(math.isfinite(row["nll"]) for row in table.values() if row is not None)
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    scalars = {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert all(map(math.isfinite, scalars["train/loss"] + scalars["val/ce"]))
    assert {"baseline/student_before_nll", "val/rouge_l"} <= scalars.keys()
