"""Attacks: images come in, AttackResults go out."""

from weakspot.attacks.boundary import fmn
from weakspot.attacks.ensemble import auto
from weakspot.attacks.few_pixels import pixels
from weakspot.attacks.foreign import external
from weakspot.attacks.gradient import fgsm, iterative, pgd
from weakspot.attacks.minimal import carlini_wagner
from weakspot.attacks.objectives import OBJECTIVES
from weakspot.attacks.registry import available_attacks, find_attack
from weakspot.attacks.sparse import elastic_net, structured
from weakspot.attacks.stored import stored
from weakspot.attacks.sweep import PixelSweep, pixel_sweep

__all__ = [
    "OBJECTIVES",
    "PixelSweep",
    "auto",
    "available_attacks",
    "carlini_wagner",
    "elastic_net",
    "external",
    "fgsm",
    "find_attack",
    "fmn",
    "iterative",
    "pgd",
    "pixel_sweep",
    "pixels",
    "stored",
    "structured",
]
