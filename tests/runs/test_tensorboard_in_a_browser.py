"""TensorBoard as a person sees it; collected only where a Chromium is found."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
import runs
from kd_lightning.callbacks.tensorboard import CHARTS
from kd_lightning.cli.program import main

PAGES = {
    "custom_scalars": [*CHARTS, "component/head_kl"],
    "images": [
        "agreement by position in the response",
        "the top and the tail of the teacher",
        "probability of the label",
    ],
    "text": ["config/text_summary", "max_steps: 4"],
    "hparams": ["model.temperature", "val/ce"],
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard over a run of four steps."""
    folder = tmp_path_factory.mktemp("seen")
    words = [*runs.little(folder / "runs" / "taid", "taid"), "--data.train", str(runs.little_data(folder))]
    assert main([*words, "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]) == 0
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"), "--port", "0"]
    with subprocess.Popen([*command, "--load_fast", "false"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        found = (re.search(r"at (http://\S+)", line) for line in server.stderr)
        yield next(match[1] for match in found if match)
        server.terminate()


if browser.CHROMIUM is not None:

    @pytest.mark.slow
    @pytest.mark.parametrize("tab", PAGES)
    def test_where_a_chromium_is_found_the_page_shows_the_run(tab: str, address: str, tmp_path: Path) -> None:
        text, picture = browser.look(f"{address}#{tab}", PAGES[tab], tmp_path)
        assert picture.startswith(b"\x89PNG")
        if tab == "custom_scalars":
            assert [int(n) for n in re.findall(r"Matches \((\d+)\)", text)] == [3, 4, 5, 2]
