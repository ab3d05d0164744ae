"""The executed notebooks as pages of the site: a hook of MkDocs.

Each notebook of `tutorials/` becomes a Markdown page, so that formulas, code, links and search work as on every other
page. `nbformat` reads the notebook; a converter such as nbconvert would add a dozen packages for joining cells. Figures
become files next to the page.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAV = "tutorials/*.ipynb"  # this entry of `nav` stands for all of them
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
OVERWRITTEN = re.compile(r"^.*\r(?!$)", re.MULTILINE)
NOTE = "*The executed notebook `tutorials/{}` of the repository.*"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the entry for all notebooks by one entry for each, with its number and its first heading."""
    pages = [{f"{path.stem[:2]} {heading(path)}": f"tutorials/{path.stem}.md"} for path in NOTEBOOKS]
    for section in config.nav or []:
        for title, entries in section.items() if isinstance(section, dict) else ():
            if NAV in entries:
                at = entries.index(NAV)
                section[title] = [*entries[:at], *pages, *entries[at + 1 :]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and their figures."""
    for path in NOTEBOOKS:
        text, figures = convert(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, picture in figures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the pages of the site."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, page: str) -> str:
    """Links between notebooks and pages of `docs/`, written as in a checkout, as links between pages of the site."""
    if page.startswith("tutorials/"):
        return re.sub(r"\]\(\.\./docs/", "](../", re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", markdown))
    up = page.count("/")
    return re.sub(rf"\]\((?:\.\./){{{up + 1}}}tutorials/(\w+)\.ipynb", rf"]({'../' * up}tutorials/\1.md", markdown)


def heading(path: Path) -> str:
    """The first heading of a notebook."""
    first: str = nbformat.read(path, as_version=4).cells[0].source
    return first.partition("\n")[0].lstrip("# ")


def convert(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by file name.

    Raises:
        ValueError: If an output is neither text nor a PNG picture.
    """
    cells = nbformat.read(path, as_version=4).cells
    title, _, rest = cells[0].source.partition("\n")
    parts = [title, NOTE.format(path.name), rest]
    figures: dict[str, bytes] = {}
    for cell in cells[1:]:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(fenced(cell.source, "python"))
        for output in cell.outputs:
            data = {"text/plain": output.text} if output.output_type == "stream" else output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(figures)}]({name})")
            elif "text/plain" in data:
                parts.append(fenced(printed(data["text/plain"]), "text output no-copy"))
            else:
                raise ValueError(f"{path.name}: cannot show an output of type {output.output_type} with {sorted(data)}")
    return "\n\n".join(parts) + "\n", figures


def printed(text: str) -> str:
    """What a terminal shows of a text: without colors and without lines that were overwritten."""
    return OVERWRITTEN.sub("", ESCAPES.sub("", text))


def fenced(text: str, classes: str) -> str:
    """A block of code with the given classes."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {{ {' '.join(f'.{name}' for name in classes.split())} }}\n{text.rstrip()}\n{fence}"
