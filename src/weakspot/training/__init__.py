"""Training by recipes, and the matrix of trained networks against tests."""

from weakspot.training.config import RECIPES, TrainConfig
from weakspot.training.matrix import MATRIX_RECIPES, Matrix, robustness_matrix
from weakspot.training.robust_accuracy import (
    TESTS,
    Judged,
    TestConfig,
    judged_images,
    outcomes,
    swap_backgrounds,
)
from weakspot.training.trainer import train

__all__ = [
    "MATRIX_RECIPES",
    "RECIPES",
    "TESTS",
    "Judged",
    "Matrix",
    "TestConfig",
    "TrainConfig",
    "judged_images",
    "outcomes",
    "robustness_matrix",
    "swap_backgrounds",
    "train",
]
