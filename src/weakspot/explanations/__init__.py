"""Explanations: pairs become scores and maps."""

from weakspot.explanations.analysis import Analysis, Picture
from weakspot.explanations.explanation import Explanation, explain
from weakspot.explanations.overlap import Overlap, overlap

__all__ = ["Analysis", "Explanation", "Overlap", "Picture", "explain", "overlap"]
