"""The network as it runs: colors tried by windows first, proofs and refutations by whole passes in batches."""

import time

import torch
from torch import Tensor

from weakspot.classifier import Classifier, check_logits
from weakspot.edits import Edits, Prepared
from weakspot.edits.engine import edited_images
from weakspot.logits import filled, logit_scale, margin
from weakspot.proofs.allowed_colors import TOP, eight_bit_value

BATCH = 64  # whole images at once, always: torch runs other kernels for other numbers of images
# Edits are exact to 1e-4 of the range of the logits. Margins below this part of it are computed again by whole passes.
NEAR_TIE = 1e-3
BATCHES = 8  # between two looks at the clock
BLOCK = 16384  # colors whose logits are in memory at once


class NetworkRuns:
    """Logits of one image with one pixel in other colors.

    Places, colors and results are on the CPU, whatever the device of the network.

    Attributes:
        label: the class of the image.
    """

    def __init__(self, classifier: Classifier, image: Tensor, label: Tensor, prepared: Prepared) -> None:
        self.classifier, self.image, self.label = classifier, image, label
        self.edits = Edits(classifier, image, prepared)

    def margins(self, rows: Tensor, columns: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) margins to 1e-4 of the range of the logits, and (M,) how near to zero is too near to trust them."""
        patches = colors.to(self.image)[:, :, None, None]
        rows, columns = rows.to(self.image.device), columns.to(self.image.device)
        logits = self.edits.logits(torch.zeros_like(rows), rows, columns, patches).cpu()
        labels = self.label.cpu().expand(len(rows))
        margins = margin(logits, labels)
        return margins, NEAR_TIE * logit_scale(logits).expand_as(margins)

    def whole(self, rows: Tensor, columns: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) margins and (M,) predicted classes of the network itself, in batches of one size."""
        if not len(rows):
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        parts = []
        size = self.classifier.fixed_batch or BATCH
        rows, columns = rows.to(self.image.device), columns.to(self.image.device)
        for part in torch.arange(len(rows), device=rows.device).split(size):
            patches = colors[part.cpu()].to(self.image)[:, :, None, None]
            images = edited_images(self.image, torch.zeros_like(part), rows[part], columns[part], patches)
            with torch.no_grad():
                parts.append(self.classifier(filled(images, size))[: len(part)])
        logits = torch.cat(parts)
        check_logits(logits, self.classifier, self.image)
        logits = logits.cpu()
        return margin(logits, self.label.cpu().expand(len(logits))), logits.argmax(1)

    def refuting(self, rows: Tensor, columns: Tensor, colors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which of these colors change the decision as run (M,), the classes (M,), and about the margins (M,).

        Only colors whose margin is near to zero or below are run whole.
        """
        margins, near = self.margins(rows, columns, colors)
        flips = torch.zeros(len(rows), dtype=torch.bool)
        predicted = self.label.cpu().repeat(len(rows))
        doubtful = (~(margins >= near)).nonzero()[:, 0]  # NaN, too
        predicted[doubtful] = self.whole(rows[doubtful], columns[doubtful], colors[doubtful])[1]
        flips[doubtful] = predicted[doubtful] != int(self.label)
        return flips, predicted, margins


def levels_between(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """First and last level k whose color k/255 lies between two values in float64; first > last if none does."""
    first, last = (TOP * low).round(), (TOP * high).round()
    # The nearest level to a bound may lie outside it.
    first = first + (eight_bit_value(first.clamp(0, TOP)) < low)
    last = last - (eight_bit_value(last.clamp(0, TOP)) > high).long()
    return first.long(), last.long()


def eight_bit_colors(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """All 8-bit colors in boxes of levels, first and last (M, C): owners (K,) and colors (K, C) in float64."""
    counts = (last - first + 1).clamp(min=0)
    totals = counts.prod(1)
    owners = torch.repeat_interleave(torch.arange(len(totals)), totals)
    # The number of each color within its box, whose digits are the levels of the channels, the last channel first.
    rest = torch.arange(len(owners)) - (totals.cumsum(0) - totals)[owners]
    levels = []
    for channel in range(first.shape[1] - 1, -1, -1):
        count = counts[owners, channel]
        levels.append(first[owners, channel] + rest % count)
        rest = rest // count
    return owners, eight_bit_value(torch.stack(levels[::-1], 1))


def enumerate_colors(
    runs: NetworkRuns, rows: Tensor, columns: Tensor, levels: tuple[Tensor, Tensor], deadline: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Try all 8-bit colors in boxes of levels (M, C), one pixel each, as whole images in batches of 64.

    Args:
        runs: of the image.
        rows: (M,) of the pixels.
        columns: (M,) of the pixels.
        levels: first and last level of each channel, (M, C) each.
        deadline: by `time.monotonic`; later boxes are left.

    Returns:
        (M,) int8: 1 where no color flips, -1 where one does, 0 where time was up; (M,) smallest margin; (M, C) the
        color that flips; (M,) the class it leads to.
    """
    count = len(rows)
    status = torch.zeros(count, dtype=torch.int8)
    lowest = torch.full((count,), -torch.inf, dtype=torch.float64)
    found = eight_bit_value(levels[0])
    predicted = runs.label.cpu().repeat(count)
    sizes = (levels[1] - levels[0] + 1).prod(1)
    for part in _parts(sizes):
        if time.monotonic() > deadline:
            break
        inside, colors = eight_bit_colors(levels[0][part], levels[1][part])
        owners = part[inside]
        # Windows only say where to look first: the color with the least margin of each pixel.
        order = runs.margins(rows[owners], columns[owners], colors)[0].argsort(stable=True)
        first = order[_first_of_each(owners[order])]
        rest = torch.ones(len(owners), dtype=torch.bool)
        rest[first] = False
        # From here down to the least margin; boxes that the deadline leaves keep minus infinity.
        lowest[part] = torch.inf
        open_now = torch.zeros(count, dtype=torch.bool)
        open_now[part] = True
        late = False
        # A proof needs every color, run by the network itself: edits are rounded differently.
        for chosen in [first, *rest.nonzero()[:, 0].split(BATCHES * BATCH)]:
            late = time.monotonic() > deadline
            if late:
                break
            now = chosen[open_now[owners[chosen]]]
            margins, classes = runs.whole(rows[owners[now]], columns[owners[now]], colors[now])
            lowest.scatter_reduce_(0, owners[now], margins.double(), "amin")
            flips = classes != int(runs.label)
            flipped = owners[now[flips]]
            status[flipped], found[flipped], predicted[flipped] = -1, colors[now[flips]], classes[flips]
            open_now[flipped] = False
        if late:
            # The colors that were not run may have any margin.
            lowest[open_now] = -torch.inf
            break
        status[open_now] = 1
    return status, lowest, found, predicted


def _parts(sizes: Tensor) -> list[Tensor]:
    """Numbers of boxes in groups of about `BLOCK` colors."""
    # A box goes with the block in which its last color lies, so that no box is divided.
    group = (sizes.cumsum(0) - 1) // BLOCK
    return list(torch.arange(len(sizes)).split(torch.bincount(group)[torch.bincount(group) > 0].tolist()))


def _first_of_each(owners: Tensor) -> Tensor:
    """The first place of each owner in a list of owners, in the order of places."""
    # A place beyond the list stands for owners that do not occur in it.
    places = torch.full((int(owners.max()) + 1,), len(owners))
    places = places.scatter_reduce(0, owners, torch.arange(len(owners)), "amin")
    return places[places < len(owners)].sort().values
