"""A damaged index of weights is refused in one line, before transformers reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.assets import resolve
from kd_lightning.models.loading import load_causal_lm

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model in one shard with an index, and the names of its weights."""
    from safetensors import safe_open

    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(resolve("asset:student"), folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / SHARD)
    with safe_open(folder / SHARD, "pt") as file:
        names = list(file.keys())
    return folder, names


def index(names: list[str], **changes: str) -> dict[str, Any]:
    return {"metadata": {"total_size": 1}, "weight_map": {**dict.fromkeys(names, SHARD), **changes}}


def test_a_model_in_shards_loads(weights: tuple[Path, list[str]]) -> None:
    folder, names = weights
    (folder / INDEX).write_text(json.dumps(index(names)), encoding="utf-8")
    load_causal_lm(str(folder))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not readable JSON"),
        ('{"weight_map": {"a": "x', "not readable JSON"),
        ("\x00\x01", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "must have a weight_map"),
        ("3", "must have a weight_map"),
        ("{}", "must have a weight_map"),
        ('{"weight_map": {}}', "must have a weight_map"),
        ('{"weight_map": ["a"]}', "must have a weight_map"),
        ('{"weight_map": "model.safetensors"}', "must have a weight_map"),
        ('{"weight_map": {"a": 3}}', "the file of weight 'a' must be a name, got 3"),
        ('{"weight_map": {"a": null}}', "must be a name, got None"),
        ('{"weight_map": {"a": ["x.safetensors"]}}', "must be a name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors', which is missing"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not directly in the folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not directly in the folder"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "not directly in the folder"),
        ('{"weight_map": {"a": "model.bin"}}', "only .safetensors files"),
        ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}, "metadata": 5}', "metadata must be a mapping"),
    ],
)
def test_a_damaged_index_is_refused(weights: tuple[Path, list[str]], text: str, said: str) -> None:
    folder, _ = weights
    (folder / INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=INDEX.replace(".", r"\.")) as error:
        load_causal_lm(str(folder), role="teacher")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_index_in_a_wrong_encoding_or_a_folder(weights: tuple[Path, list[str]]) -> None:
    folder, _ = weights
    (folder / INDEX).write_bytes(b'{"weight_map": {"\xff": "a"}}')
    with pytest.raises(ValueError, match="not readable JSON"):
        load_causal_lm(str(folder))
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()
    with pytest.raises(ValueError, match="not readable JSON"):
        load_causal_lm(str(folder))
    (folder / INDEX).rmdir()


def test_a_shard_with_other_weights_or_damaged(weights: tuple[Path, list[str]]) -> None:
    folder, names = weights
    (folder / INDEX).write_text(json.dumps(index(names[1:])), encoding="utf-8")
    load_causal_lm(str(folder))  # the map is not how transformers finds a weight
    complete = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(complete[:1000])
    try:
        with pytest.raises(ValueError, match="cannot read the weights"):
            load_causal_lm(str(folder))
    finally:
        (folder / SHARD).write_bytes(complete)
