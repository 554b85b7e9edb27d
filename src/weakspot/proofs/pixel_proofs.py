"""Certificates of single pixels: bounds, a sweep, branch and bound over the colors, and why the rest is unknown."""

import copy
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from weakspot._checks import NotFiniteError, check_choice, check_classes, check_region, is_number
from weakspot._progress import Checkpoints, Progress, ProgressOption, part, shown
from weakspot.classifier import Classifier, check_images, evaluating, predict
from weakspot.edits import Prepared, prepare
from weakspot.edits.engine import edited_images
from weakspot.proofs.affine_steps import NotSupportedError
from weakspot.proofs.allowed_colors import AllowedColors, float32_below, parse_colors
from weakspot.proofs.certificate import (
    AS_RUN,
    EXACT,
    STATEMENTS,
    UNKNOWN,
    ColorBoxes,
    PixelCertificate,
    network_record,
)
from weakspot.proofs.color_splits import TIME_UP, ColorSearch
from weakspot.proofs.determinism import check_deterministic
from weakspot.proofs.enumeration import NetworkRuns
from weakspot.proofs.ledger import Ledger
from weakspot.proofs.margin_bounds import MarginBounds
from weakspot.proofs.network_steps import BoundNetwork, bound_network
from weakspot.proofs.rounding_errors import float32_troubles

NOT_FINITE = "the network returned NaN or infinity for a changed image"
NOT_REACHED = "the search had not finished"
TRIAL = 1e-3  # of the range of the logits: how far float64 may be from the network's own float32


def certify_pixels(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    region: Tensor | None = None,
    colors: str | float = "full",
    seconds: float | None = None,
    statement: str = AS_RUN,
    progress: ProgressOption = None,
    on_checkpoint: Callable[[PixelCertificate], object] | None = None,
) -> PixelCertificate:
    """Prove or refute, for each pixel alone, that no color of it changes the decision.

    Args:
        model: a classifier of images in [0, 1], left as it was.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) the classes to keep. Of an image that the model puts into another class, every pixel is refuted by
            its own color.
        region: bool (N, 1, H, W) or (1, 1, H, W), the pixels to ask about; all if None.
        colors: which colors a pixel may take: "full" for all, "8bit" for all k/255, a radius such as 8/255 around the
            pixel's own color, or "8bit:8/255" for the 8-bit colors within a radius.
        seconds: of wall time, after which the pixels that are left stay unknown; no limit if None.
        statement: what a proof is about, "float32 as run" or "exact arithmetic".
        progress: True for a bar, or a function that is called with the fraction done.
        on_checkpoint: a function that gets what is known so far about every 20 seconds, as a certificate in which the
            pixels that are left are unknown.

    Raises:
        ValueError: if an argument does not fit, or the network does not give an image the same logits each time.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> images = torch.full((1, 1, 2, 2), 0.5)
    >>> certify_pixels(network, images, network(images).argmax(1), colors="8bit").status.shape
    torch.Size([1, 2, 2])
    """
    check_choice("statement", statement, STATEMENTS)
    allowed = parse_colors(colors)
    if seconds is not None and (not is_number(seconds) or not seconds > 0):
        raise ValueError(f"seconds must be a number above 0, got {seconds!r}")
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    count = len(images) if isinstance(images, Tensor) else 0
    with evaluating(model) as classifier, shown(progress, "certifying", total=count) as report:
        trouble = float32_troubles(classifier) if statement == AS_RUN else None
        if trouble:
            raise ValueError(f'statement must be "{EXACT}" here, got "{AS_RUN}": {trouble}')
        clean = check_images(images, classifier)
        check_classes(labels, len(clean))
        region = torch.ones(1, 1, *clean.shape[2:], dtype=torch.bool) if region is None else region
        check_region(region, clean)
        logits = predict(classifier, clean)
        check_classes(labels, len(clean), logits.shape[1])
        check_deterministic(classifier, clean[:1])
        ledger = Ledger(
            clean.cpu(),
            labels.cpu().long(),
            region.cpu().expand(len(clean), -1, -1, -1).clone(),
            *allowed.box(clean.cpu()),
        )
        prover = _Prover(classifier, ledger, allowed, as_run=statement == AS_RUN, deadline=deadline)
        save = Checkpoints(on_checkpoint)

        def tell(fraction: float) -> None:
            if report is not None:
                report(fraction)
            save(lambda: _certificate(classifier, _unfinished(ledger), allowed, statement))

        for image in range(len(clean)):
            try:
                prover.certify(image, part(tell, image, image + 1, len(clean)))
            except NotFiniteError:
                ledger.give_up(ledger.unexplained(image), NOT_FINITE)
            tell((image + 1) / len(clean))
        return _certificate(classifier, ledger, allowed, statement)


class _Prover:
    """Takes the pixels of one image after the other through all stages."""

    def __init__(
        self, classifier: Classifier, ledger: Ledger, allowed: AllowedColors, *, as_run: bool, deadline: float
    ) -> None:
        self.classifier, self.ledger, self.allowed = classifier, ledger, allowed
        self.as_run, self.deadline = as_run, deadline
        first = ledger.images[:1].to(classifier.mean.device)
        self.prepared = prepare(classifier, first)
        self.network, self.reason = None, ""
        try:
            self.network = _steps_of(classifier, first, self.prepared)
            if as_run and first.device.type != "cpu":
                self.reason = "the rounding of other devices than the CPU is not bounded"
        except NotSupportedError as reason:
            self.reason = str(reason)

    def certify(self, image: int, report: Progress | None) -> None:
        """Decide what can be decided of one image, and say of the rest why not."""
        if time.monotonic() > self.deadline:
            self.ledger.give_up(self.ledger.unexplained(image), TIME_UP)
            return
        ledger, device = self.ledger, self.classifier.mean.device
        clean, label = (
            ledger.images[image : image + 1].to(device),
            ledger.labels[image : image + 1].to(device),
        )
        runs = NetworkRuns(self.classifier, clean, label, self.prepared)
        bounds, reason = self._bounds(clean, label)
        search = ColorSearch(
            bounds,
            runs,
            ledger,
            as_run=self.as_run,
            eight_bit=self.allowed.eight_bit,
            deadline=self.deadline,
        )
        # If not even the unchanged image is proven, no box that holds its color can be.
        loose = bounds is not None and bool(bounds.clean.bound <= 0)
        # The cheapest first: one box of all colors, then colors that may refute, then splits of the rest.
        if bounds is not None and not loose:
            search.prove_at_once(ledger.open_sites(image))
        # The network as run refutes without bounds; in exact arithmetic, only bounds can.
        if bounds is not None or self.as_run:
            _sweep(search, ledger.open_sites(image))
        if bounds is not None and not loose:
            search.search(ledger.open_sites(image), report or (lambda _: None))
        # To run every color proves a pixel even if the network has no bounds.
        if self.as_run and self.allowed.eight_bit:
            search.enumerate_whole(ledger.open_sites(image))
        if bounds is not None and loose:
            # Nothing varies in the unchanged image: half the width of its bounds is what rounding takes.
            nearest = bounds.clean.lower.argmin(1)
            lost = float((bounds.clean.upper - bounds.clean.lower)[0, nearest]) / 2
            kind = "float32" if self.as_run else "float64, in which bounds are computed"
            reason = f"the image's margin is less than the bound of rounding in {kind}: {lost:.3g}"
        ledger.give_up(ledger.unexplained(image), TIME_UP if search.late else reason)

    def _bounds(self, clean: Tensor, label: Tensor) -> tuple[MarginBounds | None, str]:
        """Bounds of one image, or None and why there are none."""
        if self.network is None or self.reason:
            return None, self.reason
        try:
            bounds = MarginBounds(self.network, clean, int(label), as_run=self.as_run)
            # Under float32 as run the bounds of a deep network may be so wide that a trial would find nothing.
            check_trial(bounds.exact, self.classifier, clean, int(label))
        except NotSupportedError as reason:
            return None, str(reason)
        return bounds, ""


def _steps_of(classifier: Classifier, image: Tensor, prepared: Prepared) -> BoundNetwork:
    if prepared.recording is None:
        raise NotSupportedError(f"the network cannot be recorded: {prepared.reason}")
    return bound_network(classifier, image)


def check_trial(bounds: MarginBounds, classifier: Classifier, image: Tensor, label: int) -> None:
    """Compare bounds at single colors with the network's own margins, which must be equal up to rounding.

    Args:
        bounds: of the image.
        classifier: the network.
        image: (1, C, H, W).
        label: of the image.

    Raises:
        NotSupportedError: if the network does something else than its recording.
    """
    channels, height, width = image.shape[1:]
    places = torch.tensor([0, height * width // 2, height * width - 1])
    colors = torch.linspace(0, 1, 3 * channels).view(3, channels)
    patches = colors.to(image)[:, :, None, None]
    rows, columns = places // width, places % width
    with torch.no_grad():
        owners, tops, lefts = (each.to(image.device) for each in (torch.zeros_like(places), rows, columns))
        edited = edited_images(image, owners, tops, lefts, patches)
        logits = torch.cat([classifier(edited), classifier(image)]).double().cpu()
    if not bool(logits.isfinite().all()):
        raise NotSupportedError("logits are not finite")
    others = [k for k in range(logits.shape[1]) if k != label]
    expected = logits[:, label : label + 1] - logits[:, others]
    at_points = bounds.bounds(rows, columns, colors.double(), colors.double())
    lower = torch.cat([at_points.lower, bounds.clean.lower])
    upper = torch.cat([at_points.upper, bounds.clean.upper])
    slack = TRIAL * float((logits.amax() - logits.amin()).clamp(min=1e-6))
    if not bool((expected >= lower - slack).all() & (expected <= upper + slack).all()):
        raise NotSupportedError("the network does not compute what its recording says")


def _sweep(search: ColorSearch, sites: Tensor) -> None:
    """Refute pixels by their own color and by the corners of their box of colors."""
    ledger = search.ledger
    low, high = ledger.box(sites)
    own = ledger.color[sites].double()
    corners = [
        # The float32 numbers next to the ends of the box, on its inside: an image cannot have others.
        torch.where(torch.tensor(corner, dtype=torch.bool), float32_below(high), -float32_below(-low))
        for corner in itertools.product((False, True), repeat=low.shape[1])
    ]
    for candidates in [own, *corners]:
        open_now = ledger.status[sites] == UNKNOWN
        if search.late or not bool(open_now.any()):
            return
        search.refute(sites[open_now], candidates[open_now])


def _unfinished(ledger: Ledger) -> Ledger:
    """A copy in which every open pixel has a reason."""
    ledger = copy.deepcopy(ledger)
    for image in range(len(ledger.images)):
        ledger.give_up(ledger.unexplained(image), NOT_REACHED)
    return ledger


def _certificate(
    classifier: Classifier, ledger: Ledger, allowed: AllowedColors, statement: str
) -> PixelCertificate:
    count, channels, height, width = ledger.images.shape
    shape = (count, height, width)
    return PixelCertificate(
        status=ledger.status.view(shape),
        statement=statement,
        lower_bound=ledger.lower_bound.view(shape),
        color=ledger.color.view(*shape, channels).permute(0, 3, 1, 2).contiguous(),
        predicted=ledger.predicted.view(shape),
        reason=ledger.reason.view(shape),
        reasons=tuple(ledger.reasons),
        boxes=ColorBoxes.concatenate([ColorBoxes.none(channels), *ledger.boxes]),
        colors=allowed,
        region=ledger.region,
        images=ledger.images,
        labels=ledger.labels,
        network=network_record(classifier),
    )
