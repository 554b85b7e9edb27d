"""Images with labels, from the formats in which data sets come."""

from weakspot.datasets.folders import read_labeled
from weakspot.datasets.labeled import LabeledImages, from_tensors

__all__ = ["LabeledImages", "from_tensors", "read_labeled"]
