"""Writes the parts of pages that come from stored results and from the code. Run: python docs/stored_parts.py

They stand in the pages, between `<!-- NAME -->` and `<!-- end -->`, so that the repository shows them as well.
"""

from __future__ import annotations

import re
from pathlib import Path

from weakspot.report.glossary import TERMS
from weakspot.reproduction import PAPERS, Reproduction, read_reproduction
from weakspot.reproduction.paper_page import verdict_table

DOCS = Path(__file__).parent
PAGES = {"papers.md": "verdicts of the papers", "glossary.md": "terms of the report"}


def stored_results() -> dict[str, Reproduction]:
    """The stored reproductions (PAPER.json, and PAPER-DATA.json for further data), in the order of the papers."""
    paths = [
        path
        for paper in PAPERS
        for path in sorted((DOCS / "results").glob(f"{paper}*.json"), key=lambda path: path.stem)
    ]
    return {path.stem: read_reproduction(path) for path in paths}


def filled(page: str) -> str:
    """The text of a page with its part made again."""
    name = PAGES[page]
    if page == "papers.md":
        results = stored_results()
        # The site links to each paper's page instead, which is not in the repository.
        part = verdict_table(list(results.values()), [f"results/{name}.json" for name in results])
    else:
        part = "\n\n".join(f"**{term}**: {meaning}" for term, meaning in TERMS.items())
    text = (DOCS / page).read_text("utf-8")
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda match: f"{match[1]}\n{part}\n\n{match[2]}", text)


if __name__ == "__main__":
    for page in PAGES:
        (DOCS / page).write_text(filled(page), "utf-8")
