"""Wrapping: a network around a classifier is a classifier of the same images again."""

from __future__ import annotations

from torch import nn

from weakspot.classifier import Classifier


def around(network: nn.Module, classifier: Classifier, name: str) -> Classifier:
    """`network`, which takes images in [0, 1] and runs `classifier` somewhere inside, as a classifier of that name."""
    network.fixed_batch = classifier.fixed_batch  # type: ignore[assignment]
    network.training = classifier.training
    wrapped = Classifier(
        network, input_size=classifier.input_size, class_names=classifier.class_names, name=name
    )
    wrapped.channels = classifier.channels
    wrapped.training = classifier.training
    return wrapped
