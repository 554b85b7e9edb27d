"""Labelled images: MNIST's and CIFAR's files, folders of classes, arrays, Hugging Face data sets."""

from weakspot.datasets.formats import read_labelled
from weakspot.datasets.labelled import Labelled, from_tensors

__all__ = ["Labelled", "from_tensors", "read_labelled"]
