"""Responses that replaced those of the data, saved so that a resumed run reads the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_lightning.atomic_io import atomic_file
from kd_lightning.data.collate import SIDES


class SavedResponses:
    """The responses of each side that replaced those of the data, and the files that hold them.

    Every replacement writes a new file with all replaced responses of its side, so that each checkpoint can name the
    file it was trained on, with its hash.

    Attributes:
        texts: per side, the texts by `row_id`.
    """

    def __init__(self) -> None:
        self.texts: dict[str, dict[int, str]] = {side: {} for side in SIDES}
        self._files: dict[str, dict[str, str]] = {}
        self._replacements = 0

    def save(self, folder: Path, side: str, write: bool = True) -> None:
        """Write the texts of one side to a new file.

        Args:
            folder: ROOT/responses.
            side: "student" or "teacher".
            write: False: only remember the file; another rank writes it.
        """
        self._replacements += 1
        rows = ({"row_id": row_id, "response": text} for row_id, text in sorted(self.texts[side].items()))
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        name = f"{side}-{self._replacements:04d}.jsonl"
        self._files[side] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
        if write:
            with atomic_file(folder / name) as part:
                part.write_bytes(content)

    def read(self, folder: Path) -> Iterator[tuple[str, dict[int, str]]]:
        """Side and texts of each file that the checkpoint names.

        Raises:
            ValueError: a file is missing, or its content has changed.
        """
        for side, file in list(self._files.items()):
            path = folder / file["name"]
            if not path.is_file():
                raise ValueError(
                    f"{path}: missing, but the checkpoint was trained on these responses: restore this file to resume"
                )
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise ValueError(f"{path}: changed since the checkpoint was saved: restore the original file to resume")
            rows = [json.loads(line) for line in content.split(b"\n") if line]
            yield side, {row["row_id"]: row["response"] for row in rows}

    def state_dict(self) -> dict[str, Any]:
        """Names and hashes of the files, and the number of replacements so far."""
        return {"files": dict(self._files), "replacements": self._replacements}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the files over from a checkpoint; `read` opens them."""
        self._files, self._replacements = dict(state_dict["files"]), state_dict["replacements"]
