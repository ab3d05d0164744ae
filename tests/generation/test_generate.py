"""`kd-lightning generate`: every row once, in order, and the same text after an interruption."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from json_lines import Row, read
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from kd_lightning.data.collate import left_pad
from kd_lightning.data.prompt import parse_question
from kd_lightning.data.tokenization import TextTokenizer, load_tokenizer
from kd_lightning.generation.batch_generator import WINDOW, BatchGenerator, batches_of_rank, length_batches
from kd_lightning.generation.response_file import OtherResponsesError, Response, ResponseFile
from kd_lightning.models.generate import Sampling, generate
from kd_lightning.models.loading import load_causal_lm
from refusals import refused

ROWS = 40


def arguments(data: Path, output: Path, *more: str, model: str = "asset:student") -> list[str]:
    start = ["generate", "--model", model, "--data", str(data), "--output", str(output), "--batch_size", "4"]
    return [*start, "--max_new_tokens", "8", "--temperature", "0.9", "--seed", "5", "--progress", "false", *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.little_data(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="module")
def complete(data: Path) -> bytes:
    """The output of an uninterrupted run."""
    output = data.with_name("complete.jsonl")
    assert main(arguments(data, output)) == 0
    return output.read_bytes()


# -------------------------------------------------------------------------------------------------------- what is there
def test_every_row_in_order_with_its_fields(data: Path, complete: bytes) -> None:
    rows = [json.loads(line) for line in complete.splitlines()]
    given = read(data)
    assert [{name: row[name] for name in old} for row, old in zip(rows, given, strict=True)] == given
    for row, old in zip(rows, given, strict=True):
        assert list(row) == [*old, "model", "sampling", "finish_reason", "response"]
        assert row["finish_reason"] in ("eos", "length")
        settings = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 1.0, "seed": 5, "batch_size": 4}
        assert row["sampling"] == settings
    assert len({row["model"] for row in rows}) == 1
    assert {row["finish_reason"] for row in rows} == {"eos", "length"}


def test_greedy_responses_are_those_of_one_prompt_at_a_time(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert main(arguments(data, output, "--temperature", "0", "--dtype", "float32")) == 0
    model: Any = load_causal_lm("asset:student")
    text = TextTokenizer(load_tokenizer("asset:student"))
    for row in read(output)[:12]:
        ids = torch.tensor([text.prompt(parse_question(row, ""))[1]])
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert text.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) == row["response"]


def test_another_seed_gives_other_texts(data: Path, complete: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert main(arguments(data, output, "--seed", "6")) == 0
    other = [row["response"] for row in read(output)]
    assert sum(a != json.loads(b)["response"] for a, b in zip(other, complete.splitlines(), strict=True)) > ROWS // 2


def test_rows_of_every_form(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"instruction": "Define the noun below.", "input": "cat"},
        {"instruction": "Define the noun below.", "input": "cat", "output": ""},
        {"messages": [{"role": "user", "content": "Define the noun below.\ncat"}]},
        {
            "messages": [
                {"role": "user", "content": "Define the noun below.\ncat"},
                {"role": "assistant", "content": "x"},
            ]
        },
        {"prompt": [{"role": "user", "content": "Define the noun below.\ncat"}], "n": 1.5, "é": None},
    ]
    data, output = tmp_path / "data.jsonl", tmp_path / "out" / "out.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert main(arguments(data, output, "--temperature", "0", "--dtype", "float32")) == 0
    found = read(output)
    assert len({row["response"] for row in found}) == 1
    assert [{name: new[name] for name in old} for new, old in zip(found, rows, strict=True)] == rows


# ------------------------------------------------------------------------------------------------------------ gone on
def lines_before(content: bytes, count: int) -> int:
    return len(b"".join(content.splitlines(keepends=True)[:count]))


@pytest.mark.parametrize("cut", ["0", "1 byte", "1", "5 and a half", "9 and the fields", "39", "all but the end"])
def test_truncated_anywhere_it_resumes_to_the_same_file(cut: str, data: Path, complete: bytes, tmp_path: Path) -> None:
    half = (lines_before(complete, 5) + lines_before(complete, 6)) // 2
    length = {
        "0": 0,
        "1 byte": 1,
        "1": lines_before(complete, 1),
        "5 and a half": half,
        "9 and the fields": lines_before(complete, 9) + complete.splitlines()[9].index(b'"response"') + 14,
        "39": lines_before(complete, 39),
        "all but the end": len(complete) - 1,
    }[cut]
    output = tmp_path / "out.jsonl"
    output.write_bytes(complete[:length])
    assert main(arguments(data, output)) == 0
    assert output.read_bytes() == complete


def test_killed_while_writing(tmp_path: Path) -> None:
    data, output = runs.little_data(tmp_path, 4 * WINDOW * 6), tmp_path / "out.jsonl"
    process = runs.start(arguments(data, output))
    while not (output.exists() and output.stat().st_size > 1000):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    left = output.read_bytes()
    assert 0 < left.count(b"\n") < 4 * WINDOW * 6
    assert main(arguments(data, output)) == 0
    other = tmp_path / "other.jsonl"
    assert main(arguments(data, other)) == 0
    assert output.read_bytes() == other.read_bytes()
    assert output.read_bytes().startswith(left)


def test_a_finished_file_is_unchanged(data: Path, complete: bytes, tmp_path: Path, capfd: Any) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(complete)
    before = output.stat().st_mtime_ns
    assert main(arguments(data, output)) == 0
    assert "is complete already: 40 responses" in capfd.readouterr().err
    assert (output.read_bytes(), output.stat().st_mtime_ns) == (complete, before)


# ---------------------------------------------------------------------------------------------------------- refusals
CHANGES: dict[str, tuple[Callable[[bytes], bytes], list[str], str]] = {
    "seed": (lambda old: old, ["--seed", "6"], "seed 5, not 6"),
    "temperature": (lambda old: old[:900], ["--temperature", "0.5"], "temperature 0.9, not 0.5"),
    "batch_size": (lambda old: old, ["--batch_size", "5"], "batch_size 4, not 5"),
    "stop": (lambda old: old, ["--stop", "a", "--stop", "###"], "stop None, not ['a', '###']"),
    "min_new_tokens": (lambda old: old, ["--min_new_tokens", "2"], "min_new_tokens None, not 2"),
    "model": (lambda old: old, ["--model", "asset:teacher"], "another model"),
    "a row less": (lambda old: b"".join(old.splitlines(keepends=True)[1:]), [], "another row"),
    "a row more": (lambda old: old + old.splitlines(keepends=True)[0], [], "more than the 40 rows"),
    "a text": (lambda old: b"My diary\n", [], "line 1 is not a response to row 1"),
    "a text without end": (lambda old: b"My diary", [], "line 1 is not a response to row 1"),
    "a broken line": (lambda old: old.replace(b'"}\n', b"\n", 1), [], "line 1 is corrupt"),
}


@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES.keys())
def test_another_file_is_refused(case: Any, data: Path, complete: bytes, tmp_path: Path, capfd: Any) -> None:
    change, more, said = case
    output = tmp_path / "out.jsonl"
    output.write_bytes(change(complete))
    before = output.read_bytes()
    refused(arguments(data, output, *more), ["out.jsonl", said], capfd)
    assert output.read_bytes() == before


ARGUMENTS = {
    "temperature": (["--temperature=-1"], ["temperature", "-1"]),
    "top_p 0": (["--top_p", "0"], ["top_p", "0"]),
    "top_p above 1": (["--top_p", "1.2"], ["top_p", "1.2"]),
    "max_new_tokens": (["--max_new_tokens", "0"], ["max_new_tokens", "0"]),
    "min_new_tokens": (["--min_new_tokens", "9"], ["min_new_tokens", "max_new_tokens 8", "9"]),
    "min_new_tokens below 0": (["--min_new_tokens=-1"], ["min_new_tokens", "[0,", "-1"]),
    "an empty stop string": (["--stop", "a", "--stop", ""], ["stop must be texts that are not empty", "('a', '')"]),
    "no room in the model": (["--max_new_tokens", "512"], ["max_new_tokens", "max_position_embeddings", "512"]),
    "no room in max_length": (["--max_length", "8"], ["max_new_tokens", "max_length", "8"]),
    "batch_size": (["--batch_size", "0"], ["batch_size", "0"]),
    "output": (["--output", "out.txt"], ["output", ".jsonl", "out.txt"]),
    "no such model": (["--model", "/nowhere/model"], ["model", "/nowhere/model"]),
    "unknown asset": (["--model", "asset:techer"], ["asset:techer", "asset:teacher"]),
    "no such data": (["--data", "/nowhere/data.jsonl"], ["/nowhere/data.jsonl"]),
    "dtype": (["--dtype", "int3"], ["dtype", "int3"]),
    "misspelt": (["--top_q", "1"], ["top_q"]),
    "typed": (["--seed", "one"], ["seed", "one"]),
    "no address": (["--server", "localhost"], ["server", "localhost"]),
}


@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument(case: Any, data: Path, tmp_path: Path, capfd: Any) -> None:
    refused(arguments(data, tmp_path / "out.jsonl", *case[0]), case[1], capfd)
    assert not (tmp_path / "out.jsonl").exists()


ROWS_REFUSED = {
    "no prompt": ('{"question": "a"}', ["data.jsonl:1", "instruction", "question"]),
    "a field taken": ('{"prompt": "a", "response": "b"}', ["row 1", "'response'"]),
    "empty prompt": ('{"prompt": ""}', ["row 1", "empty prompt"]),
}


@pytest.mark.parametrize("case", ROWS_REFUSED.values(), ids=ROWS_REFUSED.keys())
def test_a_bad_row(case: Any, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "data.jsonl").write_text(case[0] + "\n")
    refused(arguments(tmp_path / "data.jsonl", tmp_path / "out.jsonl"), case[1], capfd)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_without_eos_token(data: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve("asset:student"), folder)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**fields, "eos_token_id": None}))
    refused(arguments(data, tmp_path / "out.jsonl", model=str(folder)), ["eos_token_id"], capfd)


def test_a_second_process_on_one_file_is_refused(tmp_path: Path) -> None:
    with ResponseFile(tmp_path / "a.jsonl", [{"a": 1}], "m", {}), pytest.raises(ValueError, match="another process"):
        ResponseFile(tmp_path / "a.jsonl", [{"a": 1}], "m", {}).__enter__()


# -------------------------------------------------------------------------------------------------------------- parts
def test_batches_hold_every_row_once_within_their_window() -> None:
    lengths = [(37 * n) % 101 for n in range(500)]
    found = length_batches(lengths, 7)
    assert sorted(row for rows in found for row in rows) == list(range(500))
    for number, rows in enumerate(found):
        assert {row // (7 * WINDOW) for row in rows} == {number // WINDOW}
        assert [lengths[row] for row in rows] == sorted((lengths[row] for row in rows), reverse=True)
    ours = [list(batches_of_rank(found, rank=rank, ranks=3)) for rank in range(3)]
    assert sorted(pair[0] for rank in ours for pair in rank) == list(range(len(found)))


def test_rows_are_written_in_order_whatever_order_they_finish_in(tmp_path: Path) -> None:
    rows = [{"n": n} for n in range(5)]
    with ResponseFile(tmp_path / "a.jsonl", rows, "m", {"seed": 1}) as file:
        for number, written in ((3, 0), (1, 0), (0, 2), (0, 2), (4, 2), (2, 5)):
            file.write(number, Response(f"says {number}", "eos", 3))
            assert len(read(tmp_path / "a.jsonl")) == file.done == written
    assert [row["response"] for row in read(tmp_path / "a.jsonl")] == [f"says {n}" for n in range(5)]
    with (
        pytest.raises(OtherResponsesError, match="seed 1, not 2"),
        ResponseFile(tmp_path / "a.jsonl", rows, "m", {"seed": 2}),
    ):
        pass


class Parrot(torch.nn.Module):
    """Generates the same tokens for every prompt."""

    def __init__(self, tokens: list[list[int]], eos: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokens = torch.tensor(tokens)
        self.generation_config = type("Config", (), {"eos_token_id": eos, "pad_token_id": 0})()

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.cat([input_ids, self.tokens], 1)


def test_ends_and_reasons() -> None:
    tokenizer = load_tokenizer("asset:student")
    word = tokenizer("cat").input_ids[0]
    # only an end; a word and either end; padding after it; no end at all
    tokens = [[1, 0, 0], [word, 1, 0], [word, 7, word], [word, word, word]]
    writer = BatchGenerator(Parrot(tokens, [1, 7]), tokenizer, Sampling(3))
    found = dict(writer.generate([[5]] * 4, [(0, [0, 1, 2, 3])]))
    assert [found[n].finish_reason for n in range(4)] == ["eos", "eos", "eos", "length"]
    assert [found[n].tokens for n in range(4)] == [1, 2, 2, 3]
    once = tokenizer.decode([word])
    assert [found[n].text for n in range(4)] == ["", once, once, tokenizer.decode([word] * 3)]


def test_samples_are_those_of_the_global_seed() -> None:
    model: Any = load_causal_lm("asset:student", kwargs={"dtype": "float32"}).eval()
    inputs = left_pad([load_tokenizer("asset:student")("Define the noun below.\ncat").input_ids] * 3, 0)
    state = torch.get_rng_state()
    found = generate(model, inputs["input_ids"], inputs["attention_mask"], Sampling(8), seed=2**55 + 7)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(2**55 + 7)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0)
    assert torch.equal(found, tokens[:, inputs["input_ids"].shape[1] :])


def test_prompts_go_to_the_device_of_the_computation() -> None:
    model = Parrot([[5, 1]], 1).to("meta")  # in a run: shards in host memory, computation on a GPU
    writer = BatchGenerator(model, load_tokenizer("asset:student"), Sampling(2), device=torch.device("cpu"))
    assert [response.tokens for _, response in writer.generate([[5]], [(0, [0])])] == [2]


def test_dropout_is_off_and_the_mode_is_restored() -> None:
    model: Any = load_causal_lm("asset:student", kwargs={"attention_dropout": 0.9})
    tokenizer = load_tokenizer("asset:student")
    prompts = [tokenizer("Define the noun below.\ncat").input_ids]
    writer = BatchGenerator(model.train(), tokenizer, Sampling(8, 0.0))
    first = dict(writer.generate(prompts, [(0, [0])]))
    assert model.training
    assert first == dict(writer.generate(prompts, [(0, [0])]))
    inputs = left_pad(prompts, 0)
    tokens = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
    assert writer.decode(tokens[:, inputs["input_ids"].shape[1] :]) == [first[0]]


@pytest.mark.parametrize("device", ["foo", "meta"])
def test_an_unavailable_device(device: str, data: Path, tmp_path: Path, capfd: Any) -> None:
    refused([*arguments(data, tmp_path / "out.jsonl"), "--device", device], ["device must be", repr(device)], capfd)
    assert not (tmp_path / "out.jsonl").exists()


def test_where_a_file_is_started_over_the_old_one_is_kept(tmp_path: Path) -> None:
    path, rows = tmp_path / "pass.jsonl", [{"prompt": "a"}, {"prompt": "b"}]
    for n, model in enumerate(("first", "second", "third")):
        before = path.read_bytes() if n else b""
        with ResponseFile(path, rows, model, {}, start_over=True) as file:
            assert file.done == 0
            file.write(0, Response("words", "eos", 1))
        if n:
            assert (tmp_path / f"pass.earlier-{n}.jsonl").read_bytes() == before
    with ResponseFile(path, rows, "third", {}, start_over=True) as file:
        assert file.done == 1
    assert len(list(tmp_path.iterdir())) == 3
