"""weakspot finds where an image classifier is weak, why, and what helps.

>>> import weakspot
>>> images, names = weakspot.sample_images()
>>> names
['chelsea', 'coffee', 'rocket', 'motorcycle']
"""

from weakspot import attacks, regions
from weakspot.attribution import class_activation
from weakspot.budgets import L2, Budget, Linf
from weakspot.checks import ImageWarning, ModelWarning
from weakspot.classifier import Classifier
from weakspot.explanations import Analysis, Explanation, Overlap, Picture, explain, overlap, ssim_map
from weakspot.images import read_images, sample_images
from weakspot.models import load
from weakspot.pairs import AttackResult, Pairs

__version__ = "0.1.0"
__all__ = [
    "L2",
    "Analysis",
    "AttackResult",
    "Budget",
    "Classifier",
    "Explanation",
    "ImageWarning",
    "Linf",
    "ModelWarning",
    "Overlap",
    "Pairs",
    "Picture",
    "attacks",
    "class_activation",
    "explain",
    "load",
    "overlap",
    "read_images",
    "regions",
    "sample_images",
    "ssim_map",
]
