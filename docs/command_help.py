"""What `kd-lightning COMMAND --help` prints, on the page of the commands: a hook of MkDocs.

A line `<!-- help: COMMAND -->` becomes that text. The program is run when the site is built, so the text is always
current. Of a long help only the beginning is shown, and each group of arguments after it can be unfolded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from kd_lightning.cli.command_parser import OTHER_COMMANDS

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^( *)<!-- help: (\w+) -->$", re.MULTILINE)
LONG = 100  # lines
PROGRAM = """
import contextlib, io, json, sys
from kd_lightning.cli import main
texts = {}
for command in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([command, "--help"])
    texts[command] = text.getvalue()
json.dump(texts, sys.stdout)
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Start the program; it prints its help while other pages are built."""
    config.extra["command_help"] = ThreadPoolExecutor(1).submit(helps, ["fit", *OTHER_COMMANDS])
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the markers of a page."""
    if not MARKER.search(markdown):
        return markdown
    texts = config.extra["command_help"].result()
    return MARKER.sub(lambda found: textwrap.indent(block(texts[found[2]]), found[1]), markdown)


def helps(commands: list[str]) -> dict[str, str]:
    """The help of each command, from one start of the program."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "102"}
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, env=env, input=json.dumps(commands), capture_output=True, encoding="utf-8", check=True)
    texts: dict[str, str] = json.loads(done.stdout)
    return texts


def block(text: str) -> str:
    """A help as Markdown: one block, or the first group of a long one and the others folded."""
    if text.count("\n") < LONG:
        return fenced(text)
    first, *groups = re.split(r"\n\n(?=\S.*:\n  )", text)
    parts = [fenced(f"{first}\n\n{groups[0]}")]
    for group in groups[1:]:
        heading, _, arguments = group.partition(":\n")
        names = list(dict.fromkeys(re.findall(r"^  (?:-.*?, )?(--[a-z_]+\.?)", arguments, re.MULTILINE)))
        names = [name for name in names if f"{name}." not in names]
        title = ", ".join(f"`{name}…`" if name.endswith(".") else f"`{name}`" for name in names)
        folded = textwrap.indent(fenced(group), "    ")
        parts.append(f'??? note "{title}: {heading.replace(chr(34), chr(39))}"\n{folded}')
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """A block of plain text."""
    return f"``` {{ .text .no-copy }}\n{text.strip()}\n```"
