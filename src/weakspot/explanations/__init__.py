"""Explanations: analyses turn pairs into scores and maps, and `explain` runs several of them."""

from weakspot.explanations.alignment_findings import SsimAlignment
from weakspot.explanations.analysis import Analysis, Picture, Series
from weakspot.explanations.class_evidence import interpretability_score, interpretability_test
from weakspot.explanations.explanation import Explanation, explain
from weakspot.explanations.feature_propagation import Propagation, propagation
from weakspot.explanations.patch_restoration import Restoration, restoration
from weakspot.explanations.pixel_locality import Locality, locality
from weakspot.explanations.promotion import Promotion, promotion_suppression
from weakspot.explanations.propagation_controls import PropagationStudy, propagation_study, random_edits
from weakspot.explanations.region_overlap import Overlap, overlap
from weakspot.explanations.visible_change import ssim_alignment

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
