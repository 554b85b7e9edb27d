"""Training by recipes, and the matrix of trained networks against attacks."""

from weakspot.training.config import RECIPES
from weakspot.training.matrix import Matrix, robustness_matrix
from weakspot.training.outcomes import TESTS, judged_images, outcomes, swap_backgrounds
from weakspot.training.trainer import train

__all__ = [
    "RECIPES",
    "TESTS",
    "Matrix",
    "judged_images",
    "outcomes",
    "robustness_matrix",
    "swap_backgrounds",
    "train",
]
