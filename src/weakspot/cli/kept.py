"""What is kept: the files that a command had written when it was interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

KEY = __name__
Files = dict[Path, tuple[int, int, int]]


@dataclass(frozen=True)
class Watched:
    """A folder as it was before the command began.

    Attributes:
        folder: that the command writes to.
        names: of what it writes there, files or folders; patterns too.
        before: the files of these names, each with what changes when it is written.
    """

    folder: Path
    names: Sequence[str]
    before: Files

    def written(self) -> list[str]:
        """The files written since, those in folders by their number."""
        now = _files(self.folder, self.names)
        new = [path.relative_to(self.folder).parts for path in now if now[path] != self.before.get(path)]
        inside = Counter(parts[0] for parts in new if len(parts) > 1)
        folders = [f"{name}/ ({count} file{'s' if count > 1 else ''})" for name, count in inside.items()]
        return folders + [parts[0] for parts in new if len(parts) == 1]


def watch(context: typer.Context, folder: Path, names: Sequence[str]) -> None:
    """Remember what lies in the folder, so that an interrupt can be told what the command had written.

    Args:
        context: of the command that runs.
        folder: that it will write to; need not be there.
        names: of what it will write there, files or folders; patterns too. Nothing else is looked at.
    """
    context.meta[KEY] = Watched(folder, names, _files(folder, names))


def what_is_kept(context: typer.Context) -> str:
    """What an interrupted command left behind, in words; nothing of one that watches no folder."""
    watched: Watched | None = context.meta.get(KEY)
    if watched is None:
        return ""
    written = watched.written()
    return f"written to {watched.folder} by then: {', '.join(written)}" if written else "nothing was written"


def _files(folder: Path, names: Sequence[str]) -> Files:
    found: Files = {}
    for top in (path for name in names for path in sorted(folder.glob(name))):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                about = path.stat()
                found[path] = (about.st_ino, about.st_mtime_ns, about.st_size)
    return found
