"""Dissection: which concepts a network's units stand for."""

from weakspot.dissection.broden import Annotation, Concept, ConceptSet
from weakspot.dissection.units import Dissection, dissect, dissection

__all__ = ["Annotation", "Concept", "ConceptSet", "Dissection", "dissect", "dissection"]
