"""What a one-pixel search cannot show: at how many pixels no color at all fools the network."""

from __future__ import annotations

from weakspot import _random
from weakspot.pairs import Pairs
from weakspot.proofs import certify_pixels
from weakspot.reproduction.claims import Measurement
from weakspot.reproduction.material import Material
from weakspot.statistics import mean_interval

# Quick or full: so many images, so many pixels of each, drawn at random, and a limit of time that is not reached as a
# rule; the pixels that are left then are not decided.
IMAGES, PIXELS, SECONDS = {True: 8, False: 100}, {True: 16, False: 64}, {True: 120.0, False: 600.0}


def proven_safe(material: Material, pairs: Pairs) -> tuple[Measurement, ...]:
    """Fractions of pixels that are proven safe, refuted and not decided, over all colors, for float32 as run.

    Args:
        material: the network, and whether the work is to be quick.
        pairs: whose clean images are asked about; all are classified as their labels.

    Returns:
        Three measurements; none if no pixel is proven, as in networks with layers that have no bounds.
    """
    quick = material.quick
    chosen = pairs[: IMAGES[quick]]
    clean = chosen.clean
    material.log("proving pixels safe")
    draws = _random.uniform(_random.keys(clean, material.seed), 0, clean[0, 0].numel())
    # The place of each pixel in a random order, which depends on the image and the seed alone.
    ranks = draws.argsort(1).argsort(1)
    region = (ranks < PIXELS[quick]).view(len(clean), 1, *clean.shape[2:])
    result = certify_pixels(material.model, clean, chosen.labels, region=region, seconds=SECONDS[quick])
    if not bool((result.status == 1).any()):
        return ()
    named = {
        "pixels proven safe": result.proven_fraction,
        "pixels with a color that fools": result.refuted_fraction,
        "pixels not decided": result.unknown_fraction,
    }
    return tuple(
        Measurement(name, *mean_interval(values.numpy(), material.seed), len(clean))
        for name, values in named.items()
    )
