"""Attacks: images come in, AttackResults go out."""

from weakspot.attacks.eight_bit import stored
from weakspot.attacks.ensembles import auto
from weakspot.attacks.gradient import fgsm, iterative, pgd
from weakspot.attacks.group_sparse import elastic_net, structured
from weakspot.attacks.library_attacks import external
from weakspot.attacks.losses import OBJECTIVES
from weakspot.attacks.minimum_norm import fmn
from weakspot.attacks.pixel_search import pixels
from weakspot.attacks.registry import available_attacks, find_attack
from weakspot.attacks.sweeps import PixelSweep, pixel_sweep
from weakspot.attacks.tradeoff import carlini_wagner

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
