"""Labelled images: MNIST's and CIFAR's files, folders of classes, arrays, Hugging Face data sets."""

from weakspot.datasets.labelled import Labelled, from_tensors
from weakspot.datasets.reading import read_labelled

__all__ = ["Labelled", "from_tensors", "read_labelled"]
