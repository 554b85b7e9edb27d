"""What helps against attacks, and the tests that tell help from illusion."""

from weakspot.defenses.masking import mask_units
from weakspot.defenses.masking_test import masking_test

__all__ = ["mask_units", "masking_test"]
