"""Training by recipes, and the matrix of trained networks against attacks."""

from weakspot.defenses.training.matrix import Matrix, evaluation_matrix
from weakspot.defenses.training.recipes import RECIPES
from weakspot.defenses.training.testing import TESTS, judged_images, outcomes, swap_backgrounds
from weakspot.defenses.training.training import train

__all__ = [
    "RECIPES",
    "TESTS",
    "Matrix",
    "evaluation_matrix",
    "judged_images",
    "outcomes",
    "swap_backgrounds",
    "train",
]
