"""A logger that takes secrets, as those of paid services do."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import CSVLogger


class KeyLogger(CSVLogger):
    """Writes files; reads neither key nor address."""

    def __init__(
        self, save_dir: str, api_key: str = "", address: str = "", options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(save_dir, name="keys")
