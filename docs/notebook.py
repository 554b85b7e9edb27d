"""Writes docs/tutorial.ipynb from docs/tutorial.md, so that the two never differ. Run: python docs/notebook.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
# A block of code with the output that the page shows, which a notebook makes itself.
BLOCK = re.compile(r"```python( notest)?\n(.*?)```(?:\n\nprints\n\n```text\n.*?```)?", re.DOTALL)


def notebook(page: str) -> str:
    """The content of the notebook for the text of the page."""
    cells: list[dict[str, object]] = []
    done = 0
    for match in [*BLOCK.finditer(page), None]:
        text = page[done : match.start() if match else None].strip()
        if text:
            # Links between pages do not work in a notebook that was downloaded alone.
            plain = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]+\)", r"\1", text)
            cells.append({"cell_type": "markdown", "metadata": {}, "source": plain.splitlines(keepends=True)})
        if match is None:
            break
        lines = match[2].strip().splitlines(keepends=True)
        kind = "raw" if match[1] else "code"
        cell: dict[str, object] = {"cell_type": kind, "metadata": {}, "source": lines}
        cells.append(cell if match[1] else {**cell, "execution_count": None, "outputs": []})
        done = match.end()
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    document = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    page = (DOCS / "tutorial.md").read_text("utf-8")
    (DOCS / "tutorial.ipynb").write_text(notebook(page), "utf-8")
