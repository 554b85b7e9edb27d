"""weakspot finds where an image classifier is weak, why, and what helps.

>>> import weakspot
>>> images, names = weakspot.sample_images()
>>> names
['chelsea', 'coffee', 'rocket', 'motorcycle']
"""

import weakspot._interrupts
import weakspot._openmp  # noqa: F401 - before torch

# isort: split
from importlib.metadata import version

from weakspot import attacks, defenses, regions, training
from weakspot._checks import ImageWarning, ModelWarning
from weakspot.attribution import class_activation, occlusion
from weakspot.budgets import L1, L2, SSIM, Budget, Linf, read_budget
from weakspot.classifier import Classifier
from weakspot.dissection import (
    ConceptSet,
    Dissection,
    build_concepts,
    demo_concepts,
    dissect,
    dissect_layers,
    unit_restoration,
    unit_sensitivity,
)
from weakspot.edits import LocalEdits
from weakspot.explanations import (
    Analysis,
    Explanation,
    Locality,
    Overlap,
    Picture,
    Promotion,
    Propagation,
    PropagationStudy,
    Restoration,
    SsimAlignment,
    explain,
    interpretability_score,
    locality,
    overlap,
    promotion_suppression,
    propagation,
    propagation_study,
    restoration,
    ssim_alignment,
)
from weakspot.explorer import explore
from weakspot.images import read_images, sample_images
from weakspot.logits import OneLogit
from weakspot.models import load
from weakspot.pairs import AttackResult, Pairs
from weakspot.proofs import DoubleMasking, PatchCertificate, PixelCertificate, certify_patches, certify_pixels
from weakspot.similarity import ssim_map
from weakspot.vulnerability import SmallestSquare, WeakSpots, smallest_square, weak_spots

__version__ = version("weakspot")
__all__ = [
    "L1",
    "L2",
    "SSIM",
    "Analysis",
    "AttackResult",
    "Budget",
    "Classifier",
    "ConceptSet",
    "Dissection",
    "DoubleMasking",
    "Explanation",
    "ImageWarning",
    "Linf",
    "LocalEdits",
    "Locality",
    "ModelWarning",
    "OneLogit",
    "Overlap",
    "Pairs",
    "PatchCertificate",
    "Picture",
    "PixelCertificate",
    "Promotion",
    "Propagation",
    "PropagationStudy",
    "Restoration",
    "SmallestSquare",
    "SsimAlignment",
    "WeakSpots",
    "attacks",
    "build_concepts",
    "certify_patches",
    "certify_pixels",
    "class_activation",
    "defenses",
    "demo_concepts",
    "dissect",
    "dissect_layers",
    "explain",
    "explore",
    "interpretability_score",
    "load",
    "locality",
    "occlusion",
    "overlap",
    "promotion_suppression",
    "propagation",
    "propagation_study",
    "read_budget",
    "read_images",
    "regions",
    "restoration",
    "sample_images",
    "smallest_square",
    "ssim_alignment",
    "ssim_map",
    "training",
    "unit_restoration",
    "unit_sensitivity",
    "weak_spots",
]
