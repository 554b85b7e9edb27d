"""Defenses against attacks, and their evaluation by an attacker who knows them."""

from weakspot.defenses.evaluation import evaluate_defense
from weakspot.defenses.neutralization import neutralize, neutralizing, oracle_neutralized
from weakspot.defenses.randomized import DrawnByImage, expectation
from weakspot.defenses.unit_masking import mask_units, masking, masking_sentence
from weakspot.defenses.verdicts import Verdict, verdict

__all__ = [
    "DrawnByImage",
    "Verdict",
    "evaluate_defense",
    "expectation",
    "mask_units",
    "masking",
    "masking_sentence",
    "neutralize",
    "neutralizing",
    "oracle_neutralized",
    "verdict",
]
