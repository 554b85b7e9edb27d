"""What helps against attacks, and the tests that tell help from illusion."""

from weakspot.defenses.fills import neutralize
from weakspot.defenses.judging import judge_defense, verdict
from weakspot.defenses.masking import mask_units
from weakspot.defenses.masking_test import masking_test
from weakspot.defenses.neutralizing import neutralizing
from weakspot.defenses.training import train

__all__ = ["judge_defense", "mask_units", "masking_test", "neutralize", "neutralizing", "train", "verdict"]
