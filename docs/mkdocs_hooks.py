"""Pages of the site that live outside `docs/`, where GitHub shows them, those made from stored results, and links."""

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from weakspot.reproduction import Reproduction
from weakspot.reproduction.claim_panels import draw
from weakspot.reproduction.paper_page import paper_page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # this file is loaded by its path
from stored_parts import stored_results  # noqa: E402

from benchmarks.records import stored_tables  # noqa: E402

BENCHMARKS = ROOT / "benchmarks/results"  # of the benchmarks with --json, one file for each run
TABLES = "<!-- stored benchmarks -->"  # the place of the stored benchmarks on their page
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measurements.md",
}
REPOSITORY_ONLY = {"CITATION.cff", "LICENSE"}  # links to these become plain text
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for name, result in stored_results().items():
        pictures = list(_pictures(name, result))
        for address, content in pictures:
            files.append(File.generated(config, address, content=content))
        text = paper_page(result, [address for address, _ in pictures])
        files.append(File.generated(config, f"paper-{name}.md", content=text))
    return files


def _pictures(name: str, result: Reproduction) -> Iterator[tuple[str, bytes]]:
    """Address and SVG of each panel."""
    for number, panel in enumerate(panel for claim in result.claims for panel in claim.panels):
        buffer = io.BytesIO()
        draw([panel]).savefig(buffer, format="svg", metadata={"Date": None})
        yield f"pictures/{name}-{number + 1}.svg", buffer.getvalue()


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Put stored benchmarks into their page, and point links between files of the repository at pages of the site."""
    sources = {name: source for source, name in OUTSIDE.items()}
    folder = (ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def rewritten(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups(default="")
        target = (folder / link).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        name = target.relative_to(ROOT).as_posix()
        if name in REPOSITORY_ONLY:
            return text
        if name.startswith("docs/results/"):
            name = f"paper-{Path(name).stem}.md"
        return f"{image}[{text}]({OUTSIDE.get(name, name.removeprefix('docs/'))}{anchor})"

    if TABLES in markdown:
        markdown = markdown.replace(TABLES, stored_tables(BENCHMARKS))
    # Pictures with a width are written in HTML, which GitHub shows as well.
    return LINK.sub(rewritten, markdown).replace('<img src="docs/', '<img src="')
