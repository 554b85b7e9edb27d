"""Explanations: pairs become scores and maps."""

from weakspot.explanations.alignment import SsimAlignment, ssim_alignment
from weakspot.explanations.analysis import Analysis, Picture, Series
from weakspot.explanations.explanation import Explanation, explain
from weakspot.explanations.locality import Locality, locality
from weakspot.explanations.overlap import Overlap, overlap
from weakspot.explanations.promotion import (
    Promotion,
    interpretability_score,
    interpretability_test,
    promotion_suppression,
)
from weakspot.explanations.propagation import Propagation, propagation
from weakspot.explanations.propagation_study import PropagationStudy, propagation_study, random_edits
from weakspot.explanations.restoration import Restoration, restoration

__all__ = [
    "Analysis",
    "Explanation",
    "Locality",
    "Overlap",
    "Picture",
    "Promotion",
    "Propagation",
    "PropagationStudy",
    "Restoration",
    "Series",
    "SsimAlignment",
    "explain",
    "interpretability_score",
    "interpretability_test",
    "locality",
    "overlap",
    "promotion_suppression",
    "propagation",
    "propagation_study",
    "random_edits",
    "restoration",
    "ssim_alignment",
]
