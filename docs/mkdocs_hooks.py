"""Pages of the site that live outside `docs/`, where GitHub shows them, and links between the two."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
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
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Point links between files of the repository at the pages of the site."""
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
        return f"{image}[{text}]({OUTSIDE.get(name, name.removeprefix('docs/'))}{anchor})"

    return LINK.sub(rewritten, markdown)
