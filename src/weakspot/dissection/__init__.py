"""Dissection: which concepts a network's units detect, and which of them a perturbation moves."""

from weakspot.dissection.association import (
    Association,
    associate,
    by_category,
    concept_sentence,
    join,
    moved_concepts,
)
from weakspot.dissection.causal import unit_restoration
from weakspot.dissection.concept_folders import build_concepts
from weakspot.dissection.concepts import Annotation, Concept, ConceptSet
from weakspot.dissection.demo_textures import demo_concepts
from weakspot.dissection.sensitivity import sensitivity_sentence, unit_sensitivity
from weakspot.dissection.units import Dissection, DissectionOptions, dissect, dissect_layers

__all__ = [
    "Annotation",
    "Association",
    "Concept",
    "ConceptSet",
    "Dissection",
    "DissectionOptions",
    "associate",
    "build_concepts",
    "by_category",
    "concept_sentence",
    "demo_concepts",
    "dissect",
    "dissect_layers",
    "join",
    "moved_concepts",
    "sensitivity_sentence",
    "unit_restoration",
    "unit_sensitivity",
]
