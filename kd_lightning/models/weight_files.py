"""Checks the files of weights in a model's folder before anything is loaded from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def check_weight_files(folder: Path, role: str, subfolder: str = "") -> None:
    """Check that a folder has weights that are safe to open, and every file that its index names.

    Args:
        folder: of the model; a name of the hub is not checked.
        role: named in errors.
        subfolder: of the weights, inside of `folder`.

    Raises:
        ValueError: there are no weights, only pickled ones, or the index is damaged or names a file that is missing or
            outside of the folder.
    """
    if not folder.is_dir():
        return
    weights = folder / subfolder
    if not (weights / "model.safetensors").is_file() and (weights / INDEX).exists():
        _check_index(weights / INDEX, role)
    if any(weights.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in weights.glob(pattern))
    if pickles:
        raise ValueError(
            f"{role} '{folder}' has its weights in {pickles[0]}, which can run code when opened: only safetensors are "
            "read (if you trust the file, load it with transformers and call `save_pretrained`)"
        )
    hint = ": pass --model.student_init random to start from its configuration" if role == "student" else ""
    raise ValueError(f"{role} '{folder}' has no weights (model.safetensors){hint}")


def _check_index(path: Path, role: str) -> None:
    """Check the index of weights in several files."""
    folder, begin = path.parent, f"{role} '{path.parent}': {path.name}"
    again = "download or save the model again"
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{begin} is not readable JSON ({_short(error)}): {again}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{begin} must have a weight_map from names of weights to files: {again}")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{begin}: metadata must be a mapping, got {_short(index['metadata'])}: {again}")
    for name, file in files.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"{begin}: the file of weight {_short(name)} must be a name, got {_short(file)}: {again}")
    for file in sorted(set(files.values())):
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise ValueError(f"{begin} names the file {_short(file)}, which is not directly in the folder: {again}")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{begin} names the file {_short(file)}: only .safetensors files are read")
        if not (folder / file).is_file():
            raise ValueError(f"{begin} names the file {_short(file)}, which is missing: {again}")


def _short(value: object) -> str:
    text = " ".join((str(value) if isinstance(value, Exception) else repr(value)).split())
    return text if len(text) <= 100 else text[:99] + "…"
