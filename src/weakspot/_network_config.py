"""What a network says about its classes and about the images that it takes."""

from torch import nn


def configured_names(network: nn.Module) -> list[str]:
    """Class names in the config of a transformers network; none if there are only LABEL_0, LABEL_1, ..."""
    table = getattr(getattr(network, "config", None), "id2label", None)
    if not isinstance(table, dict) or not all(isinstance(index, int) for index in table):
        return []
    names = [str(table[index]) for index in sorted(table)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names


def configured_size(network: nn.Module) -> tuple[int, int] | None:
    """The (height, width) in the config of a transformers network, if there is one."""
    size = getattr(getattr(network, "config", None), "image_size", None)
    height, width = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def image_channels(network: nn.Module, statistics: int, size: tuple[int, int]) -> int:
    """Number of channels of an image: that of mean and std, else of the first convolution or of a flattened image."""
    if statistics > 1:
        return statistics
    convolution = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if convolution is not None:
        return convolution.in_channels
    linear = next((module for module in network.modules() if isinstance(module, nn.Linear)), None)
    if linear is not None and linear.in_features == size[0] * size[1]:
        return 1
    return 3
