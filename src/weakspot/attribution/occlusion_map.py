"""Occlusion: how much a class's logit falls where a cell of the image is covered."""

import torch
from torch import Tensor, nn

from weakspot._checks import check_choice, check_classes, check_count
from weakspot.classifier import check_images, evaluating
from weakspot.edits import Edits, cells, exchanged, prepare, windowed

FILLS = ("mean", "gray", "black")


def occlusion(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    *,
    cell: int = 16,
    fill: str = "mean",
    batch_size: int | None = None,
) -> Tensor:
    """Measure how much the class's logit falls when a cell is covered (Zeiler and Fergus 2014, arXiv 1311.2901).

    Cells tile the image; those at the right and lower border may be smaller. Edits go through `LocalEdits`.

    Args:
        model: any classifier.
        images: (N, C, H, W) in [0, 1].
        classes: (N,) the class that each image is explained for.
        cell: side of the cells in pixels.
        fill: what covers them: the image's "mean" color, "gray" (one half) or "black".
        batch_size: edits at once; it changes no result.

    Returns:
        (N, 1, H, W), the same at every pixel of a cell; negative where covering helps the class.

    Raises:
        ValueError: if an argument does not fit, naming it.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).eval()
    >>> occlusion(model, torch.rand(1, 3, 4, 4), torch.tensor([0]), cell=2).shape
    torch.Size([1, 1, 4, 4])
    """
    check_count("cell", cell)
    check_choice("fill", fill, FILLS)
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        check_classes(classes, len(images), name="classes")
        classes = classes.to(images.device, torch.long)
        groups = cells(images.shape[2], images.shape[3], cell).to(images.device)
        batches = windowed(groups, cell)
        # One recording of the network serves all images, which have one size.
        prepared = prepare(classifier, images[:1])
        maps = []
        for image, wanted in zip(images.split(1), classes, strict=True):
            edits = Edits(classifier, image, prepared, batch_size=batch_size)
            logits = edits.clean_logits()
            check_classes(classes, len(images), logits.shape[1], name="classes")
            before = logits[0, wanted]
            covered = exchanged(edits, _cover(image, fill), batches)[:, wanted]
            # One fall for each cell (G,), put at every pixel of the cell by its number.
            maps.append((before - covered)[groups][None, None].float())
    return torch.cat(maps)


def _cover(image: Tensor, fill: str) -> Tensor:
    if fill == "mean":
        return image.mean((2, 3), keepdim=True).expand_as(image)
    return torch.full_like(image, 0.5 if fill == "gray" else 0.0)
