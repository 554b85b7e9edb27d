"""LabeledImages images: MNIST's and CIFAR's files, folders of classes, arrays, Hugging Face data sets."""

from weakspot.datasets.formats import read_labeled
from weakspot.datasets.labeled import LabeledImages, from_tensors

__all__ = ["LabeledImages", "from_tensors", "read_labeled"]
