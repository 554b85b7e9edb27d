"""The explorer from Python: `weakspot.explore` serves the bench in the background and returns a view of it."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weakspot._checks import check_batch, check_count, require
from weakspot._progress import in_notebook
from weakspot.classifier import as_classifier
from weakspot.pairs import Pairs

if TYPE_CHECKING:
    from weakspot.explorer.bench import Bench
    from weakspot.explorer.desk import Desk
    from weakspot.explorer.notebook_view import Widget
    from weakspot.explorer.service import Service


@dataclass(eq=False)
class View:
    """A bench that is shown somewhere.

    Attributes:
        url: the link to open, with its token; empty in a notebook.
        bench: the images and what was done to them.
        desk: answers the page's requests.
    """

    url: str
    bench: Bench
    desk: Desk

    def __repr__(self) -> str:
        where = f" at {self.url}" if self.url else ""
        return f"View({len(self.bench.exhibits)} images of {self.bench.classifier.name}{where})"

    @property
    def mask(self) -> Tensor | None:
        """The mask as it is on the page: bool (1, 1, H, W), on the CPU; None if nothing is brushed."""
        return self.bench.brushed

    @property
    def pairs(self) -> Pairs | None:
        """The last attack on each image that was attacked, named like the images; None if there is none.

        Raises:
            ValueError: if images of different sizes were attacked.
        """
        attacked = [one for one in self.bench.exhibits if one.pair is not None]
        if not attacked:
            return None
        sizes = sorted({one.size for one in attacked})
        if len(sizes) > 1:
            got = " and ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(f"pairs must be of images of one size (height x width), got {got}")
        pairs = [one.attacked() for one in attacked]
        return Pairs(
            torch.cat([pair.clean for pair in pairs]),
            torch.cat([pair.adversarial for pair in pairs]),
            torch.cat([pair.labels for pair in pairs]),
            torch.cat([pair.targets for pair in pairs]),
            names=tuple(one.name for one in attacked),
        )

    def close(self) -> None:
        """End the explorer; the model is free again."""
        self.desk.close()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False, repr=False)
class ServedView(View):
    """A view in a browser.

    Attributes:
        service: that serves it.
    """

    service: Service

    def close(self) -> None:
        """End the server and the explorer."""
        self.service.close()


@dataclass(eq=False, repr=False)
class NotebookView(View):
    """A view in a cell of a notebook: the last expression of a cell shows it, or `display`.

    Attributes:
        widget: an anywidget, which other widgets can contain.
    """

    widget: Widget

    def _repr_mimebundle_(self, **kwargs: object) -> object:
        return self.widget._repr_mimebundle_(**kwargs)

    def close(self) -> None:
        """End the explorer and remove it from the cell."""
        self.desk.close()
        self.widget.close()


def explore(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    names: Sequence[str] | None = None,
    port: int = 8765,
) -> View:
    """Show images and a model: probe, brush a region, attack inside it, explain.

    In a notebook, the returned view is shown in the cell, and no port is opened. Elsewhere it opens in the browser: the
    page is served on this machine only, behind a random token, by threads of this process. The call returns at once.

    The model is used by one thread at a time, and is left as it was. Do not train it while the view is open.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) classes of the images; by default the model's predictions.
        names: N names.
        port: to serve on, or the next free one; not used in a notebook.

    Returns:
        A view: `.url`, `.mask` (bool (1, 1, H, W), as brushed now), `.pairs` (of the last attack on each image) and
        `.close()`. It is a context manager.

    Raises:
        ValueError: if an argument does not fit, or the extra `weakspot[explore]` is not installed, or
            `weakspot[notebook]` in a notebook.
    """
    check_count("port", port, least=0)
    notebook = in_notebook()
    if notebook:
        require("weakspot.explore in a notebook", "anywidget", extra="notebook")
    else:
        require("weakspot.explore", "starlette", "uvicorn", "websockets", extra="explore")
    from weakspot.explorer.desk import Desk

    desk = Desk(fill_bench(model, images, labels=labels, names=names))
    if notebook:
        from weakspot.explorer.notebook_view import bench_widget

        return NotebookView("", desk.bench, desk, bench_widget(desk))
    from weakspot.explorer.service import Service, has_display

    service = Service.prepare(desk, port=port)
    service.start()
    view = ServedView(service.url, desk.bench, desk, service)
    if has_display():
        webbrowser.open(view.url)
    return view


def fill_bench(
    model: nn.Module, images: Tensor, *, labels: Tensor | None = None, names: Sequence[str] | None = None
) -> Bench:
    """A bench with images from Python; arguments are those of `explore`."""
    from weakspot.explorer.bench import Bench

    classifier = as_classifier(model)
    check_batch(images)
    if names is not None and len(names) != len(images):
        raise ValueError(f"names must have one entry for each of {len(images)} images, got {len(names)}")
    bench = Bench(classifier)
    bench.add(images, names or [f"image {number}" for number in range(len(images))], labels)
    return bench
