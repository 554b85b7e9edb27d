"""What helps against attacks, and the tests that tell help from illusion."""

from weakspot.defenses.evaluation import evaluate_defense
from weakspot.defenses.fills import neutralize
from weakspot.defenses.masking import mask_units
from weakspot.defenses.masking_test import masking_sentence, masking_test
from weakspot.defenses.neutralizing import neutralizing
from weakspot.defenses.oracle import oracle_neutralized
from weakspot.defenses.randomness import DrawnByImage, expectation
from weakspot.defenses.training import train
from weakspot.defenses.verdicts import Verdict, verdict

__all__ = [
    "DrawnByImage",
    "Verdict",
    "evaluate_defense",
    "expectation",
    "mask_units",
    "masking_sentence",
    "masking_test",
    "neutralize",
    "neutralizing",
    "oracle_neutralized",
    "train",
    "verdict",
]
