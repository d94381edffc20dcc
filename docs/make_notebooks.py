"""Write the notebooks of ``examples/`` from their pages: ``python docs/make_notebooks.py``.

A ```bash or ```python block of a page becomes a cell to run, everything between a cell of text.
Cells have no outputs; links lead from ``examples/`` to the pages.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parent
EXAMPLES = DOCS.with_name("examples")
NOTEBOOKS = {"tutorial": "tutorial.ipynb", "read-a-store": "read_a_store.ipynb"}
"""Notebook of each page, without its suffix."""
HEAD = (
    "*Made from [{page}]({page}) by `docs/make_notebooks.py`. Run it in a folder of its own, with "
    "the Python that kvdistill is installed in: `pip install notebook`, then `jupyter notebook`.*"
)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)]*)?\)")


def notebook(page: str) -> str:
    """The notebook of a page of ``docs/``, as the text of its file."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    title, _, text = text.partition("\n")
    head = f"{title}\n\n{HEAD.format(page=f'../docs/{page}.md')}"
    cells, end = [new_markdown_cell(head)], 0
    for block in BLOCK.finditer(text):
        _append_text(cells, text[end : block.start()])
        language, code = block.groups()
        magic = "%%bash -e\n" if language == "bash" else ""
        cells.append(new_code_cell(magic + code.rstrip("\n")))
        end = block.end()
    _append_text(cells, text[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.validate(made)
    return str(nbformat.writes(made)) + "\n"


def _append_text(cells: list[nbformat.NotebookNode], text: str) -> None:
    if text.strip():
        cells.append(new_markdown_cell(LINK.sub(_moved, text.strip("\n"))))


def _moved(link: re.Match[str]) -> str:
    return f"]({os.path.relpath(DOCS / link[1], EXAMPLES)}{link[2] or ''})"


if __name__ == "__main__":
    for page, name in NOTEBOOKS.items():
        (EXAMPLES / name).write_text(notebook(page), encoding="utf-8")
