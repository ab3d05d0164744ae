"""FSDP2 for two models: every rank has its shard, results are those of one device, and bad sizes are refused."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

import processes
import runs
from architectures import VOCABULARY, tiny
from kd_lightning import TAID
from kd_lightning.cli.program import main
from kd_lightning.distributed.checkpoint_io import AtomicCheckpointIO
from kd_lightning.distributed.dtensor import full_state_dict, local_shard
from kd_lightning.distributed.fsdp2 import transformer_layers
from kd_lightning.models.generate import Sampling, generate
from kd_lightning.strategies import FSDP2Strategy
from sharded_fits import joined, train
from tiny_fits import Batch, Run, assert_same_student, rows, split

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # resumed runs write elsewhere

EPOCHS = 2
SHARES = {1: [8], 2: [5, 3], 4: [2, 2, 2, 2]}  # rows of each rank that reads


def run(
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    ckpt: Path | None = None,
    student: Any = None,
    strategy: str | None = None,
    **sizes: Any,
) -> Run:
    """Two epochs of one AdamW step, with a checkpoint of each epoch and the export."""
    torch.manual_seed(0)
    student = student or tiny("llama", tie_word_embeddings=True)
    teacher = tiny("llama", hidden_size=48)
    module = Run(student, teacher, TAID(), ce_weight=0.5)
    readers = ranks // sizes.get("tensor_parallel_size", 1)
    batch = split(rows(8, VOCABULARY), *SHARES[readers])[rank * readers // ranks]
    chosen = strategy or (FSDP2Strategy(**sizes) if ranks > 1 else "auto")
    train(module, batch, folder, ckpt, devices=ranks, strategy=chosen, max_epochs=EPOCHS, gradient_clip_val=0.05)
    return module


def held(model: nn.Module) -> int:
    """Number of elements on this rank."""
    return sum(local_shard(parameter).numel() for parameter in model.parameters())


def prompts(rank: int) -> Batch:
    ids = torch.randint(3, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def responses(model: Any, rank: int) -> Tensor:
    """The two ranks stop at different lengths."""
    return generate(model, **prompts(rank), sampling=Sampling((3, 9)[rank], temperature=0.0))


def on_two_ranks(rank: int, folder: str) -> dict[str, Any]:
    joined(rank, 2)
    module = run(Path(folder) / "file", rank, 2)
    found: dict[str, Any] = {
        "student": full_state_dict(module.student),
        "held": [held(module.student), held(module.teacher.model)],
        "moments": sum(local_shard(s["exp_avg"]).numel() for s in module.trainer.optimizers[0].state.values()),
        "responses": [responses(module.student, rank), responses(module.teacher.model, rank)],
    }
    run(Path(folder) / "folder", rank, 2, save_distributed_checkpoint=True)
    for kind in ("file", "folder"):
        start = Path(folder) / kind / "epoch=0.ckpt"
        found[f"resumed from a {kind}"] = full_state_dict(run(Path(folder) / f"{kind} again", rank, 2, start).student)
    ddp = run(Path(folder) / "ddp", rank, 2, Path(folder) / "folder" / "epoch=0.ckpt", strategy="ddp")
    found["resumed by ddp"] = full_state_dict(ddp.student)
    found["checkpoint IO"] = type(ddp.trainer.strategy.checkpoint_io).__name__
    spared = run(Path(folder) / "spared", rank, 2, activation_checkpointing=True, cpu_offload=True)
    found["spared"] = full_state_dict(spared.student)
    for name, student in (("uncut", tiny("bert")), ("odd", tiny("llama", vocab_size=VOCABULARY + 1))):
        with pytest.raises(ValueError) as refusal:
            run(Path(folder) / name, rank, 2, student=student, tensor_parallel_size=2)
        found[name] = str(refusal.value)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The results of two ranks, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return folder, processes.run(on_two_ranks, str(folder))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on one device."""
    return run(tmp_path_factory.mktemp("one"))


Two = tuple[Path, list[dict[str, Any]]]


def test_clipped_steps_are_one_devices(two: Two, one: Run) -> None:
    for found in two[1]:
        assert_same_student(found["student"], full_state_dict(one.student))
        assert_same_student(found["spared"], full_state_dict(one.student))


def test_every_rank_has_its_shard(two: Two, one: Run) -> None:
    first, second = two[1]
    for i, model in enumerate((one.student, one.teacher.model)):
        parts = [found["held"][i] for found in (first, second)]
        assert sum(parts) == held(model)
        assert abs(parts[0] - parts[1]) <= 0.05 * held(model)
    assert first["moments"] + second["moments"] == held(one.student)


def test_ranks_that_stop_at_different_lengths_generate_what_one_device_does(two: Two, one: Run) -> None:
    for rank, found in enumerate(two[1]):
        for there, model in zip(found["responses"], (one.student, one.teacher.model), strict=True):
            assert torch.equal(there, responses(model, rank))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_resumed_run_has_the_same_bits(two: Two, kind: str) -> None:
    for found in two[1]:
        for name, tensor in found["student"].items():
            assert torch.equal(found[f"resumed from a {kind}"][name], tensor), name


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_device_resumes_the_checkpoint_and_exports_the_same_bytes(
    two: Two, one: Run, kind: str, tmp_path: Path
) -> None:
    folder = two[0]
    resumed = run(tmp_path / "again", ckpt=folder / kind / "epoch=0.ckpt")
    assert_same_student(full_state_dict(resumed.student), full_state_dict(one.student))
    run(tmp_path / "over", ckpt=folder / kind / f"epoch={EPOCHS - 1}.ckpt")  # no step is left, only the export
    files = sorted(path.name for path in (folder / kind / "student").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "over" / "student").iterdir())
    for name in files:
        assert (folder / kind / "student" / name).read_bytes() == (tmp_path / "over" / "student" / name).read_bytes()


def test_ddp_resumes_from_a_folder_without_a_plugin(two: Two, one: Run) -> None:
    for found in two[1]:
        assert found["checkpoint IO"] == "AtomicCheckpointIO"
        assert_same_student(found["resumed by ddp"], full_state_dict(one.student))


def test_heads_that_cannot_be_split(two: Two) -> None:
    for found in two[1]:
        assert found["uncut"].startswith("strategy.tensor_parallel_size must be 1 for a student that cannot be split")
        assert found["odd"] == "strategy.tensor_parallel_size must divide the student's vocabulary, 81, got 2"


def test_a_checkpoint_with_a_missing_file_is_refused(two: Two, tmp_path: Path) -> None:
    folder = tmp_path / "broken.ckpt"
    complete = two[0] / "folder" / "epoch=0.ckpt"
    folder.mkdir()
    for path in complete.iterdir():
        if path.name != "rank-00001.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    assert AtomicCheckpointIO().load_checkpoint(complete)["global_step"] == 1
    with pytest.raises(ValueError, match=r"the checkpoint is incomplete: no file has rows .* of"):
        AtomicCheckpointIO().load_checkpoint(folder)


SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "hybrid": {"shard_size": 2},
    "head": {"tensor_parallel_size": 2},
    "both, in a folder": {"shard_size": 1, "tensor_parallel_size": 2, "save_distributed_checkpoint": True},
}


def on_four_ranks(rank: int, folder: str, start: str) -> dict[str, Any]:
    joined(rank, 4)
    found = {}
    for name, sizes in SIZES.items():
        module = run(Path(folder) / name, rank, 4, Path(start), **sizes)
        # ranks that share a vocabulary generate the same
        said = responses(module.student, rank // sizes.get("tensor_parallel_size", 1) % 2)
        found[name] = [full_state_dict(module.student), held(module.student), said]
    return found


@pytest.mark.slow
def test_four_ranks_resume_the_checkpoint_of_two_and_one_resumes_theirs(two: Two, one: Run, tmp_path: Path) -> None:
    ranks = processes.run(on_four_ranks, str(tmp_path), str(two[0] / "folder" / "epoch=0.ckpt"), world_size=4)
    for name, copies in zip(SIZES, (1, 2, 1, 2), strict=True):
        for rank, found in enumerate(ranks):
            assert_same_student(found[name][0], full_state_dict(one.student))
            reader = rank // SIZES[name].get("tensor_parallel_size", 1)
            assert torch.equal(found[name][2], responses(one.student, reader % 2)), name
        assert sum(found[name][1] for found in ranks) >= copies * held(one.student)
        resumed = run(tmp_path / f"{name}, on one", ckpt=tmp_path / name / "epoch=1.ckpt")
        assert_same_student(full_state_dict(resumed.student), full_state_dict(one.student))


# --------------------------------------------------------------------------------------------------------------- wiring
def test_layers_are_the_outermost_lists_without_shared_parameters() -> None:
    model = tiny("llama")
    assert transformer_layers(model) == list(model.model.layers)
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    assert transformer_layers(model) == []
    mixture = tiny("mixtral")
    assert transformer_layers(mixture) == list(mixture.model.layers)


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (4, {"shard_size": 3}, r"strategy\.shard_size must divide the number of ranks, 4, got 3"),
        (2, {"shard_size": 0}, r"strategy\.shard_size must divide .* got 0"),
        (4, {"tensor_parallel_size": 3}, r"strategy\.tensor_parallel_size must divide the number of ranks, 4, got 3"),
        (
            4,
            {"shard_size": 4, "tensor_parallel_size": 2},
            r"strategy\.shard_size .* \(groups of 2 read the same rows\), got 4",
        ),
    ],
)
def test_sizes_that_do_not_divide(devices: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L.Trainer(accelerator="cpu", devices=devices, strategy=FSDP2Strategy(**sizes), logger=False)


def test_an_unsupported_precision() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision must be one of 32-true, .* with fsdp2, got '64-true'"):
        L.Trainer(accelerator="cpu", devices=2, strategy="fsdp2", precision="64-true", logger=False)


def test_the_program_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "fit",
        "--config",
        "quickstart",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.accelerator",
        "cpu",
    ]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.shard_size", "3"]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("strategy.shard_size must divide the number of ranks, 2, got 3")


# --------------------------------------------------------------------------------------------------------------- faults
def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_last_checkpoint_is_complete(victim: int, tmp_path: Path) -> None:
    arguments = [*runs.little(tmp_path, steps=10_000), "--data.train", str(runs.little_data(tmp_path))]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--checkpoint.every_n_train_steps", "1"]
    arguments += ["--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "0"]
    job = runs.start(arguments, start_new_session=True)
    try:
        last = tmp_path / "checkpoints" / "last.ckpt"
        end = time.monotonic() + 300
        while not last.exists():
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        (second,) = [pid for pid in children(job.pid) if b"kd_lightning" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill((job.pid, second)[victim], signal.SIGKILL)
        job.communicate(timeout=60)
        assert job.returncode != 0
        end = time.monotonic() + 60
        while alive(second):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        if job.poll() is None or alive(job.pid):
            os.killpg(job.pid, signal.SIGKILL)
    assert AtomicCheckpointIO().load_checkpoint(last)["global_step"] >= 1


@pytest.mark.slow
def test_a_grown_replay_buffer_is_resumed(tmp_path: Path) -> None:
    data = ["--data.train", str(runs.little_data(tmp_path)), "--trainer.strategy", "fsdp2", "--trainer.devices", "2"]
    data += ["--model.responses.threshold", "1.0", "--model.responses.capacity", "12"]
    data += ["--model.responses.max_new_tokens", "4"]
    for steps, more in ((3, []), (6, ["--ckpt_path", "last"])):
        code, _, err = runs.finish([*runs.little(tmp_path / "root", "distillm", steps=steps), *data, *more])
        assert code == 0, err
    last = AtomicCheckpointIO().load_checkpoint(tmp_path / "root" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 6
    assert len(last["state_dict"]["responses.memory.labels"]) == 12


@pytest.mark.slow
def test_a_sharded_teacher_cannot_mix_into_generation(tmp_path: Path) -> None:
    arguments = [*runs.little(tmp_path / "root", "minillm", steps=2), "--data.train", str(runs.little_data(tmp_path))]
    arguments += ["--trainer.strategy", "fsdp2", "--trainer.devices", "2", "--model.responses.max_new_tokens", "4"]
    code, _, err = runs.finish(arguments)
    assert code == 1
    assert "kd-lightning: error: teacher_share must be 0 if the strategy shards the teacher (fsdp2): use ddp" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_and_keeps_existing_checkpoints(tmp_path: Path) -> None:
    with runs.small_disk(tmp_path, "12m") as disk:
        arguments = [*runs.little(disk / "root", steps=40), "--trainer.devices", "2"]
        arguments += ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
        arguments += ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k=-1"]
        code, _, err = runs.finish(arguments)
        assert code == 1, err
        said = [line for line in err.splitlines() if line.startswith("kd-lightning: error:")]
        assert 1 <= len(said) <= 2  # the first rank that fails ends the job, maybe before the other one prints
        assert len(set(said)) == 1
        assert "could not be written by rank" in said[0] and "No space left" in said[0]
        assert "Traceback" not in err
        kept = list((disk / "root" / "checkpoints").glob("*.ckpt"))
        assert len(kept) >= 2
        steps = {path.name: AtomicCheckpointIO().load_checkpoint(path)["global_step"] for path in kept}
        assert max(steps.values()) >= 1
        assert not list((disk / "root" / "checkpoints").glob(".*.part"))
