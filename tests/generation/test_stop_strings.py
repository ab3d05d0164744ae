"""Stop strings and `min_new_tokens`: the same responses as a slow loop that decodes everything at every token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from json_lines import read
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.program import main
from kd_lightning.data.collate import left_pad
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.generation.batch_generator import BatchGenerator
from kd_lightning.generation.response_file import Response
from kd_lightning.generation.stop_strings import StopStrings
from kd_lightning.models.generate import Sampling, generate, stop_strings
from kd_lightning.models.hf_adapter import eos_token_ids
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.serving.completion import RawCompletion, to_completion

Decode = Callable[[list[int]], str]
PROMPTS = ["cat", "a very long journey through the mountains", "house", "blue", "to run quickly", "dog", "water"]


def decoder(tokenizer: Any) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stopped_at(ids: list[int], sampling: Sampling, decode: Decode) -> int | None:
    """Where the text of a response is cut, from the definition; None: it contains no stop string that counts."""
    text, first = decode(ids), decode(ids[: sampling.min_new_tokens]).rstrip("\ufffd")
    places = [
        place
        for stop in sampling.stop
        for place in range(len(text))
        if text.startswith(stop, place) and place + len(stop) > len(first)
    ]
    return min(places, default=None)


def slow(model: Any, tokenizer: Any, prompt: list[int], sampling: Sampling) -> Response:
    """One prompt, without padding and cache."""
    decode, eos, ids = decoder(tokenizer), eos_token_ids(model), []
    while len(ids) < sampling.max_new_tokens:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
        if len(ids) < sampling.min_new_tokens:
            scores[eos] = -torch.inf
        token = int(scores.argmax())
        if token in eos:
            return Response(decode(ids), "eos", len(ids) + 1)
        ids.append(token)
        if (place := stopped_at(ids, sampling, decode)) is not None:
            return Response(decode(ids)[:place], "stop", len(ids))
    return Response(decode(ids), "length", len(ids))


@pytest.fixture(scope="module")
def student() -> tuple[Any, Any]:
    return load_causal_lm("asset:student", kwargs={"dtype": "float32"}).eval(), load_tokenizer("asset:student")


@pytest.mark.parametrize(
    ("least", "stop"),
    [(0, ()), (6, ()), (0, ("e",)), (3, ("e",)), (0, ("ing", " of a", ", ")), (4, (" a", "or")), (12, ("t",))],
)
def test_a_batch_gives_the_responses_of_a_slow_loop(student: Any, least: int, stop: tuple[str, ...]) -> None:
    model, tokenizer = student
    prompts = [tokenizer(f"Define the noun below.\n{word}").input_ids for word in PROMPTS]
    sampling = Sampling(12, 0.0, min_new_tokens=least, stop=stop)
    writer = BatchGenerator(model, tokenizer, sampling)
    together = dict(writer.generate(prompts, [(0, list(range(len(prompts))))]))
    expected = [slow(model, tokenizer, prompt, sampling) for prompt in prompts]
    assert [together[row] for row in range(len(prompts))] == expected
    if stop == ("e",) and least == 0:
        assert "stop" in {response.finish_reason for response in expected}
    if least == 12:
        assert {response.tokens for response in expected} == {12}
    assert {response.tokens >= least for response in expected} == {True}


def test_samples_of_a_row_do_not_depend_on_where_others_stop(student: Any) -> None:
    model, tokenizer = student
    prompts = [tokenizer(f"Define the noun below.\n{word}").input_ids for word in PROMPTS]
    batch = [(0, list(range(len(prompts))))]
    plain = dict(BatchGenerator(model, tokenizer, Sampling(12), seed=3).generate(prompts, batch))
    cut = dict(BatchGenerator(model, tokenizer, Sampling(12, stop=("a", "the")), seed=3).generate(prompts, batch))
    for row, response in plain.items():
        places = [place for stop in ("a", "the") if (place := response.text.find(stop)) >= 0]
        assert cut[row].text == response.text[: min(places, default=None)]
        assert cut[row].finish_reason == ("stop" if places else response.finish_reason)
    assert {response.finish_reason for response in cut.values()} > {"stop"}


def run(criterion: StopStrings, rows: Sequence[Sequence[int]]) -> list[int]:
    """The number of tokens after which each row of a batch is over; the length of the longest: it is not."""
    longest = max(map(len, rows))
    over: dict[int, int] = {}
    for step in range(1, longest + 1):
        tokens = torch.tensor([[*row, *[0] * longest][:step] for row in rows])
        for row, end in enumerate(criterion(tokens, torch.empty(0)).tolist()):
            if end:
                over.setdefault(row, step)
    return [over.get(row, longest) for row in range(len(rows))]


@pytest.mark.parametrize("name", ["asset:student", "asset:student_byte_fallback"])
def test_a_stop_string_across_tokens(name: str) -> None:
    tokenizer = load_tokenizer(name)
    decode = decoder(tokenizer)
    text = "One small step for a man, 雪が降る café 🙂🙂🙂 and then\n\nUser: more of it, 雪が降る🙂 ### the end"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for stop in ["\n\nUser:", "降る🙂", "🙂 #", "é 🙂", "mall st", "降る", "###", "d", "not there"]:
        sampling = Sampling(len(ids), stop=(stop,))
        criterion = StopStrings(sampling, decode, [-1])
        (count,) = run(criterion, [ids])
        if stop == "not there":
            assert criterion.found == {}
        else:
            assert criterion.found == {0: (count, text[: text.index(stop)])}
            assert stop not in decode(ids[: count - 1])


@pytest.mark.parametrize("name", ["asset:student", "asset:student_byte_fallback"])
def test_random_tokens_stop_where_the_whole_text_does(name: str) -> None:
    tokenizer, dice = load_tokenizer(name), random.Random(5)
    decode, size = decoder(tokenizer), len(tokenizer)
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in ("雪", "🙂", "é", " a", ", ", "the")]
    stops = 0
    for trial in range(60):
        parts = [dice.choice(words) if dice.random() < 0.7 else [dice.randrange(size)] for _ in range(90)]
        ids = [token for part in parts for token in part][:160]
        text = decode(ids)
        cuts = [dice.randrange(len(text) // 2, len(text) - 4) for _ in range(2)]
        stop = tuple(text[cut : cut + dice.randint(1, 4)] for cut in cuts)
        sampling = Sampling(200, min_new_tokens=dice.choice([0, 0, 5, 60]), stop=stop)
        eos = [ids[-1] if trial % 2 else -1]
        expected, count = {}, len(ids)
        for end in range(1, len(ids) + 1):
            if ids[end - 1] in eos:
                count = end
                break
            if (place := stopped_at(ids[:end], sampling, decode)) is not None:
                expected, count = {0: (end, decode(ids[:end])[:place])}, end
                break
        criterion = StopStrings(sampling, decode, eos)
        assert run(criterion, [ids]) == [count]
        assert criterion.found == expected
        stops += bool(expected)
    assert stops > 30


def test_the_work_for_a_token_does_not_grow_with_the_response() -> None:
    tokenizer = load_tokenizer("asset:student")
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return decoder(tokenizer)(ids)

    ids = tokenizer("a word and another one, " * 60, add_special_tokens=False).input_ids
    run(StopStrings(Sampling(len(ids), stop=("###",)), decode, [-1]), [ids])
    assert len(ids) > 300
    assert max(decoded) < 60


def test_the_end_of_sequence_is_no_part_of_the_text(student: Any) -> None:
    _, tokenizer = student
    words = tokenizer("cat dog", add_special_tokens=False).input_ids
    criterion = StopStrings(Sampling(9, stop=("dog",)), decoder(tokenizer), [words[-1]])
    assert run(criterion, [words]) == [len(words)]
    assert criterion.found == {}


def test_output_with_stop_strings_resumes(tmp_path: Path) -> None:
    data, output = runs.little_data(tmp_path, 20), tmp_path / "out.jsonl"
    words = [
        "generate",
        "--model",
        "asset:student",
        "--data",
        str(data),
        "--output",
        str(output),
        "--progress",
        "false",
    ]
    words += ["--max_new_tokens", "8", "--batch_size", "4", "--temperature", "0.9", "--stop", "[1]", "--stop=o"]
    words += ["--min_new_tokens", "2"]
    assert main(words) == 0
    complete = output.read_bytes()
    rows = read(output)
    assert {"stop", "length"} <= {row["finish_reason"] for row in rows} <= {"stop", "eos", "length"}
    settings = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 1.0, "min_new_tokens": 2, "stop": ["[1]", "o"]}
    assert rows[0]["sampling"] == {**settings, "seed": 0, "batch_size": 4}
    output.write_bytes(complete[: len(complete) // 2])
    assert main(words) == 0
    assert output.read_bytes() == complete


def test_stop_strings_of_python_and_of_regeneration(student: Any) -> None:
    assert [stop_strings(given) for given in (None, "ab", ["a", "b"], [])] == [(), ("ab",), ("a", "b"), ()]
    callback = Regeneration("teacher", "once", 8, stop=["###"], min_new_tokens=2)
    assert callback.sampling == Sampling(8, 1.0, 1.0, 2, ("###",))
    assert [Response("", reason, 1).finished for reason in ("eos", "stop", "length")] == [True, True, False]
    inputs = left_pad([[5]], 0)
    with pytest.raises(ValueError, match="criteria must have StopStrings"):
        generate(student[0], inputs["input_ids"], inputs["attention_mask"], Sampling(2, stop=("a",)))


@pytest.mark.parametrize("bad", [[""], [1], ["a", None]])
def test_a_bad_stop_string(bad: Any) -> None:
    with pytest.raises(ValueError, match="stop must be texts that are not empty, got "):
        Sampling(4, stop=stop_strings(bad))


def test_a_served_response_that_a_stop_string_ended(student: Any) -> None:
    tokenizer = student[1]
    ids = tokenizer("The cat###", add_special_tokens=False).input_ids
    found = to_completion(RawCompletion("The cat", "stop", ids, None), tokenizer, [1], "a prompt")
    assert (found.ids, found.text, found.finish_reason) == (ids, "The cat", "stop")
    with pytest.raises(ValueError, match="do not decode to its text"):
        to_completion(RawCompletion("The dog", "stop", ids, None), tokenizer, [1], "a prompt")
    assert json.dumps(Sampling(4).settings()) == '{"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0}'
