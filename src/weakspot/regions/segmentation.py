"""Backgrounds: the sites outside the object, which a localized attack may alter."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import ImageWarning, check_batch, check_choice, check_classes, check_range, warn
from weakspot.classifier import evaluating, predict
from weakspot.regions.activation import cam

METHODS = ("auto", "threshold", "grabcut", "cam")
INK = 0.1  # gray value above which a pixel belongs to a character
ITERATIONS = 5  # of GrabCut
INNER = 3 / 4  # of each side: GrabCut takes everything outside this rectangle for background
SHORT, ZOOM = 64, 4  # images with a shorter side are enlarged: GrabCut fits models to many pixels
PLAUSIBLE = (0.1, 0.8)  # fraction of the image that a foreground covers
FOREGROUND = 0.3  # fraction of the image that is foreground by class activation
LISTED = 8  # images that a warning names


def background(
    images: Tensor, *, method: str = "auto", model: nn.Module | None = None, classes: Tensor | None = None
) -> Tensor:
    """Return the background of each image, which an attack may alter while the object stays as it is.

    For the localized attacks of Rothberg et al. 2019 (arXiv 1909.04779), re-specified from the abstract; how the
    background is found, and every number, is ours. GrabCut is that of Rother et al. 2004 as in OpenCV. Its random
    numbers are seeded anew for each image, and no others are drawn.

    Args:
        images: (N, C, H, W) in [0, 1].
        method: "threshold": more than one pixel, diagonals included, away from every pixel above 0.1, for gray images
            on a dark ground. "grabcut": what 5 iterations of GrabCut from the inner 3/4 of each side leave out, for
            gray and color; images with a side under 64 are enlarged 4 times. "cam": all but the 30% with most evidence
            for a class; needs `model`. "auto": threshold for gray images and GrabCut for color; if the resulting
            foreground covers less than 10% or more than 80% of an image, then "cam" for that image if `model` is
            given, else everything outside the rectangle.
        model: any classifier, whose class activation "cam" and "auto" use.
        classes: (N,) the class whose evidence counts; if None, the model's own predictions.

    Returns:
        Bool (N, 1, H, W), true in the background.

    Raises:
        ValueError: if an argument does not fit or the method needs other images or a model.

    Warns:
        ImageWarning: if "auto" discarded the foreground of some images, naming them.

    >>> dot = torch.zeros(1, 1, 4, 4)
    >>> dot[..., 0, 0] = 1
    >>> background(dot, method="threshold").int()
    tensor([[[[0, 0, 1, 1],
              [0, 0, 1, 1],
              [1, 1, 1, 1],
              [1, 1, 1, 1]]]], dtype=torch.int32)
    """
    images = _checked_images(images, method, model, classes)
    if method == "cam" and model is not None:
        return _outside_activation(model, images, classes)
    by_threshold = method == "threshold" or (method == "auto" and images.shape[1] == 1)
    region = (
        _outside_ink(images) if by_threshold else torch.stack([_outside_grabcut(image) for image in images])
    )
    if method != "auto":
        return region
    foreground = (~region).flatten(1).double().mean(1)
    implausible = (foreground < PLAUSIBLE[0]) | (foreground > PLAUSIBLE[1])
    if bool(implausible.any()):
        if model is None:
            region[implausible] = ~_inner_rectangle(images)
            instead = (
                "all outside the inner rectangle, 3/4 of each side (model= gives class activation instead)"
            )
        else:
            chosen = None if classes is None else classes.to(images.device)[implausible]
            region[implausible] = _outside_activation(model, images[implausible], chosen)
            instead = f"all but the {FOREGROUND:.0%} with most evidence for the class"
        _warn(implausible, "the threshold" if by_threshold else "GrabCut", instead)
    return region


def _checked_images(images: Tensor, method: str, model: nn.Module | None, classes: Tensor | None) -> Tensor:
    """The images without gradients, clipped to [0, 1] in a copy."""
    check_choice("method", method, METHODS)
    check_batch(images)
    check_range(images)
    if classes is not None:
        check_classes(classes, len(images), name="classes")
    if method == "cam" and model is None:
        raise ValueError("model must be a classifier for method 'cam', got None")
    _, channels, height, width = images.shape
    allowed = {"threshold": {1}, "cam": {channels}}.get(method, {1, 3})
    if channels not in allowed:
        listed = " or ".join(map(str, sorted(allowed)))
        raise ValueError(f"images must have {listed} channels for method {method!r}, got {channels}")
    if method in {"auto", "grabcut"} and min(height, width) < 3:
        raise ValueError(
            f"images must be at least 3 x 3 pixels for method {method!r}, got {height} x {width}"
        )
    return images.detach().clamp(0, 1)


def _outside_ink(images: Tensor) -> Tensor:
    # A maximum over 3 x 3 dilates the ink by one pixel.
    return F.max_pool2d((images > INK).float(), 3, 1, 1) == 0


def _outside_activation(model: nn.Module, images: Tensor, classes: Tensor | None) -> Tensor:
    with evaluating(model) as classifier:
        if classes is None:
            classes = predict(classifier, images.to(classifier.mean.device, torch.float32)).argmax(1)
        return ~cam(classifier, images, classes, fraction=FOREGROUND).to(images.device)


def _outside_grabcut(image: Tensor) -> Tensor:
    """Bool (1, H, W) of an image (C, H, W)."""
    import cv2
    import numpy as np

    height, width = image.shape[1:]
    zoom = ZOOM if min(height, width) < SHORT else 1
    pixels = (image.float().expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    # OpenCV takes x before y, and width before height.
    pixels = cv2.resize(pixels, (width * zoom, height * zoom))
    (top, inner_height), (left, inner_width) = _inner(height), _inner(width)
    rectangle = (left * zoom, top * zoom, inner_width * zoom, inner_height * zoom)
    mask = np.zeros(pixels.shape[:2], np.uint8)
    # OpenCV's color models of background and foreground.
    behind, before = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, mask, rectangle, behind, before, ITERATIONS, cv2.GC_INIT_WITH_RECT)
    foreground = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
    centers = slice(zoom // 2, None, zoom)  # back to the pixels of the image
    return torch.from_numpy(~foreground[centers, centers])[None].to(image.device)


def _inner_rectangle(images: Tensor) -> Tensor:
    """Bool (1, H, W)."""
    height, width = images.shape[2:]
    (top, inner_height), (left, inner_width) = _inner(height), _inner(width)
    inside = torch.zeros(1, height, width, dtype=torch.bool, device=images.device)
    inside[:, top : top + inner_height, left : left + inner_width] = True
    return inside


def _inner(side: int) -> tuple[int, int]:
    """Start and length of the rectangle along a side of at least 3 pixels; at least one is outside at both ends."""
    margin = max(1, round(side * (1 - INNER) / 2))
    return margin, side - 2 * margin


def _warn(implausible: Tensor, source: str, instead: str) -> None:
    numbers = implausible.nonzero()[:, 0].tolist()
    more = f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else ""
    warn(
        f"{source} found a foreground under {PLAUSIBLE[0]:.0%} or over {PLAUSIBLE[1]:.0%} of the image in "
        f"{'image' if len(numbers) == 1 else 'images'} {', '.join(map(str, numbers[:LISTED]))}{more}; there the "
        f"background is {instead}",
        ImageWarning,
    )
