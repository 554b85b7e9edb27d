"""Problems of changing small masks alone, as crops of their images."""

from dataclasses import replace

import torch
from torch import Tensor

from weakspot.attacks.context import Problem
from weakspot.edits import Crops, bounding_boxes, differentiable_engine

LARGEST_CROP = 0.5  # of an image: crops that are larger save nothing
CROPS_AT_ONCE = 6  # times as many crops as whole images go through the model at once


def cropped(problem: Problem, masks: Tensor, owners: Tensor) -> Problem:
    """The problem of changing each mask alone. Small masks become crops, whose passes recompute only what they reach.

    Args:
        problem: of whole images.
        masks: bool (M, 1, H, W), the sites that may change.
        owners: (M,) the number of each mask's image within the problem.

    Returns:
        A problem of M images, or of the parts of them that hold the masks.
    """
    part = replace(problem.select(owners), region=masks, everywhere=bool(masks.all()))
    tops, lefts, (height, width) = bounding_boxes(masks[:, 0])
    if height * width > LARGEST_CROP * masks[0].numel():
        return part
    engine = differentiable_engine(problem.classifier, problem.clean)
    crops = Crops(problem.classifier, problem.clean, engine, owners, tops, lefts)
    region = crops.cut(masks, (height, width), torch.arange(len(masks), device=owners.device))
    at_once = CROPS_AT_ONCE * problem.batch_size
    return replace(
        part,
        clean=crops.cut(problem.clean, (height, width), owners),
        region=region,
        everywhere=bool(region.all()),
        crops=crops,
        batch_size=problem.batch_size if engine is None else at_once,
    )
