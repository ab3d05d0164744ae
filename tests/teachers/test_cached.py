"""What is read from a cache is what the teacher would say; a cache of anything else is refused, both values named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import runs
from kd_lightning import DistillationLoss, DistillationModule, ForwardKL
from kd_lightning.cli.program import main
from kd_lightning.data import InstructionDataModule
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.teachers.cache_format import CacheManifest, CacheReader, row_keys
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.training.student import StudentWithLoss
from locations import SUPPORT
from refusals import refused

FP32 = {"dtype": "float32"}


def words(data: Path, out: Path, *extra: str) -> list[str]:
    """The command on a small file."""
    common = ["--config", str(runs.CONFIGS / "quickstart.yaml"), "--data.train", str(data), "--data.batch_size", "8"]
    return ["cache", *common, "--data.val", "null", "--data.test", "null", *runs.CPU, "--output", str(out), *extra]


def fit(root: Path, data: Path, cache: Path, *extra: str) -> list[str]:
    """A short fit from a cache."""
    from_cache = ["--model.teacher", "CachedTeacher", "--model.teacher.path", str(cache)]
    alone = ["--data.train", str(data), "--data.val", str(data), "--data.test", "null"]
    return [*runs.little(root), *from_cache, *alone, *extra]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small file of rows, and its caches by kind."""
    folder = tmp_path_factory.mktemp("kept")
    data = runs.little_data(folder, rows=40)
    found = {"data": data}
    for name, extra in {
        "hidden": ["--dtype", "float32"],
        "bfloat16": [],
        "top_k": ["--kind", "top_k", "--k", "6", "--dtype", "float32"],
    }.items():
        found[name] = folder / name
        assert main(words(data, found[name], *extra)) == 0
    return found


def batches(data: Path, **kwargs: Any) -> Iterator[dict[str, Tensor]]:
    datamodule = InstructionDataModule(str(data), tokenizer="asset:student", batch_size=5, max_length=128, **kwargs)
    datamodule.setup("fit")
    yield from datamodule.train_dataloader()


def opened(folder: Path) -> CachedTeacher:
    teacher = CachedTeacher(str(folder))
    teacher.load()
    return teacher


@pytest.fixture(scope="module")
def live() -> HFTeacher:
    teacher = HFTeacher("asset:teacher")
    teacher.load()
    return teacher


# --------------------------------------------------------------------------------------------------------- what is read
def test_hidden_states_are_those_of_the_teacher_in_any_order(kept: dict[str, Path], live: HFTeacher) -> None:
    cached = opened(kept["hidden"])
    assert cached.head is not None and live.head is not None
    assert torch.equal(cached.head.weight, live.head.weight)
    seen = 0
    for batch in batches(kept["data"]):
        counted = next_token_mask(batch["labels"])
        found, expected = cached.hidden(batch), live.hidden(batch)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert torch.equal(found[:, :-1][~counted], torch.zeros_like(found[:, :-1][~counted]))
        # a bf16 teacher rounds differently in another batch
        torch.testing.assert_close(found[:, :-1][counted], expected[:, :-1][counted].float(), atol=0.1, rtol=0.05)
        seen += int(counted.sum())
    assert seen == cached.description.tokens


def test_rows_are_found_by_content(kept: dict[str, Path]) -> None:
    cached = opened(kept["hidden"])
    (whole,) = [b for b, _ in zip(batches(kept["data"], shuffle=False), range(1), strict=False)]
    left = {name: whole[name].flip(0) for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(cached.hidden(left), cached.hidden(whole).flip(0), atol=0, rtol=0)
    wide = {  # padded more, and on both sides
        "input_ids": torch.nn.functional.pad(whole["input_ids"], (3, 2), value=7),
        "attention_mask": torch.nn.functional.pad(whole["attention_mask"], (3, 2)),
        "labels": torch.nn.functional.pad(whole["labels"], (3, 2), value=-100),
    }
    torch.testing.assert_close(cached.hidden(wide)[:, 3:-2], cached.hidden(whole), atol=0, rtol=0)
    other = {**whole, "labels": whole["labels"].masked_fill(torch.arange(len(whole["labels"][0])) == 3, -100)}
    if not torch.equal(other["labels"], whole["labels"]):
        assert not torch.equal(row_keys(other), row_keys(whole))
    changed = whole["input_ids"].clone()
    changed[1, 2] += 1
    with pytest.raises(ValueError, match="has no rows"):
        cached.hidden({**whole, "input_ids": changed})
    nothing = torch.full_like(whole["labels"], -100)
    assert not cached.hidden({**whole, "input_ids": changed, "labels": nothing}).any()


@pytest.mark.parametrize("kind", ["hidden", "bfloat16"])
def test_bfloat16_rounds_and_nothing_else(kind: str, kept: dict[str, Path]) -> None:
    for batch in batches(kept["data"]):
        exact, rounded = opened(kept["hidden"]).hidden(batch), opened(kept["bfloat16"]).hidden(batch)
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(exact.to(torch.bfloat16), rounded)
        break


def test_the_top_k_are_the_teachers(kept: dict[str, Path]) -> None:
    cached, hidden = opened(kept["top_k"]), opened(kept["hidden"])
    assert cached.head is None
    for batch in batches(kept["data"]):
        counted, labels = next_token_mask(batch["labels"]), batch["labels"][:, 1:]
        known = cached.logits(batch)[:, :-1][counted]
        log_p = hidden.logits(batch)[:, :-1][counted].log_softmax(-1)
        ids = known.ids.long()
        torch.testing.assert_close(known.log_probs, log_p.gather(-1, ids), atol=1e-5, rtol=0)
        rest = log_p.scatter(-1, ids, -torch.inf).exp().sum(-1)
        torch.testing.assert_close(known.log_tail.exp(), rest, atol=1e-6, rtol=1e-4)
        assert (ids == labels[counted].unsqueeze(1)).any(1).all()
        top = log_p.topk(6).indices
        assert torch.equal(ids[:, :5], top[:, :5])


# ------------------------------------------------------------------------------------------------------------- training
def test_the_first_step_is_the_live_one_and_no_teacher_is_asked(
    tmp_path: Path, kept: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an fp32 teacher, loss and gradient to 1e-6."""
    data = kept["data"]
    live = DistillationModule("asset:student", "asset:teacher", ce_weight=0.3, temperature=2.0, teacher_kwargs=FP32)
    live.configure_model()
    datamodule = InstructionDataModule(str(data), tokenizer="asset:student", batch_size=7, max_length=128)
    datamodule.setup("fit")
    assert live.teacher is not None
    fill_cache(tmp_path / "cache", live.teacher, datamodule, live.model.vocabulary, dtype="float32", bar=False)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher was read")

    monkeypatch.setattr(HFTeacher, "load", never)
    away = DistillationModule("asset:student", CachedTeacher(str(tmp_path / "cache")), ce_weight=0.3, temperature=2.0)
    away.configure_model()
    for batch in batches(data):
        losses = []
        for module in (live, away):
            module.zero_grad()
            parts = module.model(batch, module.teacher)
            parts.mean.backward()
            losses.append(parts.mean.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        for (name, one), other in zip(live.student.named_parameters(), away.student.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=0, msg=name)


def refuse(model: Any) -> Any:
    raise ValueError("cannot be split")


def test_a_student_that_cannot_be_cut_reads_a_cache_too(kept: dict[str, Path]) -> None:
    away = DistillationModule("asset:student", CachedTeacher(str(kept["hidden"])))
    away.configure_model()
    batch = next(batches(kept["data"]))
    for name in ("hidden", "top_k"):
        teacher = opened(kept[name])
        whole = StudentWithLoss(None, away.loss)
        whole.set_student(away.student, split=refuse)
        assert away.model.head() is not None and whole.head() is None
        through = away.model(batch, teacher).mean
        torch.testing.assert_close(whole(batch, teacher).mean, through, atol=1e-5, rtol=1e-5)


def test_a_run_from_top_k_measures_lower_bounds(tmp_path: Path, kept: dict[str, Path]) -> None:
    module = DistillationModule("asset:student", CachedTeacher(str(kept["hidden"])))
    module.configure_model()
    assert module.model is not None
    loss = DistillationLoss(ForwardKL(), monitors={"kl": ForwardKL()}, diagnostics=True)
    batch = next(batches(kept["data"]))
    full, few = (module.model(batch, opened(kept[name]), loss).values for name in ("hidden", "top_k"))
    assert (few["kl"] <= full["kl"] + 1e-5).all() and (few["kl"] < full["kl"] - 1e-3).any()
    torch.testing.assert_close(few["teacher_nll"], full["teacher_nll"], atol=1e-5, rtol=1e-5)
    assert main(fit(tmp_path, kept["data"], kept["top_k"], "--model.objective", "SkewReverseKL")) == 0


def test_a_subset_in_another_order_is_found(tmp_path: Path, kept: dict[str, Path]) -> None:
    lines = kept["data"].read_text(encoding="utf-8").splitlines()[5:30]
    part = tmp_path / "part.jsonl"
    part.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    assert main(fit(tmp_path / "root", part, kept["hidden"])) == 0


# ------------------------------------------------------------------------------------------------------------- writing
def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path, kept: dict[str, Path]) -> None:
    folder = shutil.copytree(kept["hidden"], tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(words(kept["data"], folder, "--dtype", "float32")) == 0
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_more_data_is_added(tmp_path: Path, kept: dict[str, Path]) -> None:
    folder, more = shutil.copytree(kept["hidden"], tmp_path / "cache"), runs.little_data(tmp_path, rows=60)
    before = {path.name for path in folder.iterdir()}
    assert main(words(more, folder, "--dtype", "float32")) == 0
    (new,) = {path.name for path in folder.iterdir()} - before
    assert CacheManifest.read(folder).data["train"].startswith("60 rows")
    assert len(load_file(folder / new)["lengths"]) == 20
    for data in (more, kept["data"]):
        for batch in batches(data):
            opened(folder).hidden(batch)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--dtype", "float32"], ["--kind", "top_k", "--k", "3"]], ids=["hidden", "top_k"])
def test_killed_and_repeated_equals_untouched(extra: list[str], tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=400)
    cut = words(data, tmp_path / "cut", *extra)
    small = str(SUPPORT / "small_shards.py")
    runs.kill_when(cut, tmp_path / "cut" / "shard-00000-000003.safetensors", program=(small,))
    assert CacheManifest.read(tmp_path / "cut").tokens is None
    assert runs.finish(cut)[0] == 0
    assert main(words(data, tmp_path / "whole", *extra)) == 0
    one, other = (opened(tmp_path / name) for name in ("whole", "cut"))
    assert one.description == other.description
    assert len(one._opened().tables) == 1 and len(other._opened().tables) >= 5
    for batch in batches(data):
        a, b = one._read(batch), other._read(batch)
        assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------ bad input
MISMATCHES: dict[str, tuple[list[str], list[str]]] = {
    "another teacher": (["--model.teacher.teacher", "asset:student"], ["another teacher", "asset:teacher"]),
    "another length": (["--data.max_length", "64"], ["another max_length", "128", "64"]),
    "another template": (
        ["--data.chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"],
        ["another chat template", "…"],
    ),
}


@pytest.mark.parametrize("case", MISMATCHES.values(), ids=MISMATCHES.keys())
def test_a_cache_of_something_else(
    case: tuple[list[str], list[str]], tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    refused(fit(tmp_path / "root", kept["data"], kept["hidden"], *case[0]), [str(kept["hidden"]), *case[1]], capfd)


def test_a_cache_of_another_tokenizer(tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    student = shutil.copytree(runs.resolve("asset:student"), tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = (next(token for token, i in vocab.items() if i == wanted) for wanted in (300, 301))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    line = fit(tmp_path / "root", kept["data"], kept["hidden"], "--model.student", str(student))
    refused(line, ["another tokenizer"], capfd)


def test_a_cache_of_other_rows(tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    more = runs.little_data(tmp_path, rows=43)
    said = ["lacks 3 rows of train", f"{more}:41", "40 rows", "43 rows"]
    refused(fit(tmp_path / "root", more, kept["hidden"]), said, capfd)


REFUSED: dict[str, tuple[str, list[str], list[str]]] = {
    "TAID": ("top_k", ["--model.objective", "TAID"], ["TAID", "GeometricMixture", "hidden"]),
    "AMiD": (
        "top_k",
        [
            "--model.objective",
            '{"class_path": "AMiD", "init_args": {"divergence": "ForwardKL", "alpha": 0.5, "teacher_weight": 0.3}}',
        ],
        ["AMiD", "AlphaMixture"],
    ),
    "AKL": ("top_k", ["--model.objective", "AdaptiveKL"], ["AdaptiveKL"]),
    "α-β": (
        "top_k",
        ["--model.objective", '{"class_path": "AlphaBeta", "init_args": {"alpha": 0.2, "beta": 0.7}}'],
        ["AlphaBeta", "0.2", "0.7"],
    ),
    "a monitor": ("top_k", ["--model.monitors", '{"a": "AdaptiveKL"}'], ["AdaptiveKL"]),
    "a temperature": ("top_k", ["--model.temperature", "2"], ["temperature", "2"]),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_top_k_cannot_give(
    case: tuple[str, list[str], list[str]], tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    refused(fit(tmp_path / "root", kept["data"], kept[case[0]], *case[1]), case[2], capfd)


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "kind": (["--kind", "logits"], ["kind", "logits", "hidden", "top_k"]),
    "dtype": (["--dtype", "int8"], ["dtype", "int8", "bfloat16"]),
    "k": (["--kind", "top_k", "--k", "2048"], ["k must", "2048", "2047"]),
    "k that is no number": (["--kind", "top_k", "--k", "many"], ["--k", "many"]),
    "k of 0": (["--kind", "top_k", "--k", "0"], ["k must", "0"]),
    "shard_mib": (["--shard_mib", "0"], ["shard_mib", "0"]),
    "no teacher": (["--model.teacher", "null", "--model.ce_weight", "1"], ["model.teacher is null"]),
}


@pytest.mark.parametrize("case", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_bad_argument(
    case: tuple[list[str], list[str]], tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    refused(words(kept["data"], tmp_path / "cache", *case[0]), case[1], capfd)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("config", "writer"),
    [
        ("seqkd", "Regeneration"),
        ("distillm2", "Regeneration"),
        ("gkd", "OnPolicy"),
        ("distillm", "AdaptiveReplay"),
        ("minillm", "MiniLLM"),
    ],
)
def test_words_that_are_written_in_the_run(
    config: str, writer: str, tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be written down of them beforehand, and nothing is."""
    common = [*runs.little(tmp_path / "root", config), "--data.train", str(kept["data"])]
    refused(["cache", *common[1:], "--output", str(tmp_path / "cache")], ["cache: ", writer, "generate"], capfd)
    refused([*common, "--model.teacher_cache", "true"], ["teacher_cache must be false", writer], capfd)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    cached = ["--model.teacher", "CachedTeacher", "--model.teacher.path", str(kept["hidden"])]
    said = ["cache holds no responses", "leave"]
    if writer == "Regeneration":
        said = ["a CachedTeacher has no outputs for the responses of Regeneration", "remove Regeneration"]
    refused([*common, *cached], said, capfd)


def test_another_kind_is_not_mixed_in(kept: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    refused(words(kept["data"], kept["hidden"]), ["another dtype", "float32", "bfloat16"], capfd)
    refused(words(kept["data"], kept["hidden"], "--kind", "top_k"), ["another kind", "'hidden'", "'top_k'"], capfd)
    away = ["--model.teacher", "CachedTeacher", "--model.teacher.path", str(kept["hidden"])]
    refused(
        words(kept["data"], kept["bfloat16"], *away),
        ["already a cache", "pass the teacher itself", str(kept["hidden"])],
        capfd,
    )


def spoil(folder: Path, how: str) -> None:
    """Break a cache."""
    shard, manifest = next(folder.glob("shard-*")), folder / "cache.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "a broken description":
        manifest.write_text("{", encoding="utf-8")
    elif how == "another version":
        manifest.write_text(json.dumps({**content, "version": 7}), encoding="utf-8")
    elif how == "not finished":
        manifest.write_text(json.dumps({**content, "tokens": None}), encoding="utf-8")
    elif how == "a shard cut off":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif how == "a shard of another cache":
        save_file(load_file(shard), shard, metadata={"description": "0" * 64})
    else:
        (folder / "head.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("empty", ["no teacher cache", "kd-lightning cache"]),
        ("a broken description", ["cache.json", "version"]),
        ("another version", ["version 7"]),
        ("not finished", ["is incomplete", "rerun", "resume"]),
        ("a shard cut off", ["shard-00000-000000.safetensors", "cannot be read"]),
        ("a shard of another cache", ["shard-00000-000000.safetensors", "another cache"]),
        ("no head", ["head.safetensors", "cannot be read"]),
    ],
)
def test_a_broken_cache(
    how: str, said: list[str], tmp_path: Path, kept: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(kept["hidden"], tmp_path / "cache")
    spoil(folder, how)
    refused(fit(tmp_path / "root", kept["data"], folder), said, capfd)


def test_shards_are_mapped_not_read(kept: dict[str, Path]) -> None:
    shards = CacheReader(kept["hidden"], CacheManifest.read(kept["hidden"]).digest)
    assert len(shards.tables) == 1
    assert str(kept["hidden"] / "shard-00000-000000.safetensors") in Path("/proc/self/maps").read_text()
