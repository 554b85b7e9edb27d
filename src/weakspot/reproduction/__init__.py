"""The empirical claims of five papers, measured on your own data, each with its control and a verdict."""

from weakspot.reproduction.claims import VERDICTS, Claim, Measurement, Reproduction, read_reproduction
from weakspot.reproduction.material import Material
from weakspot.reproduction.papers import PAPERS, reproduce

__all__ = [
    "PAPERS",
    "VERDICTS",
    "Claim",
    "Material",
    "Measurement",
    "Reproduction",
    "read_reproduction",
    "reproduce",
]
