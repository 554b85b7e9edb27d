"""Attacks: images come in, AttackResults go out."""

from weakspot.attacks.context import AttackOptions
from weakspot.attacks.eight_bit import stored
from weakspot.attacks.ensembles import ensemble
from weakspot.attacks.few_pixels import few_pixel
from weakspot.attacks.gradient import bim, fgsm, pgd
from weakspot.attacks.library_attacks import external
from weakspot.attacks.losses import LOSSES, minimizes
from weakspot.attacks.minimum_norm import fmn
from weakspot.attacks.registry import Attack, available_attacks, find_attack
from weakspot.attacks.smallest_change import minimal_pgd
from weakspot.attacks.sweeps import PixelSweep, pixel_sweep
from weakspot.attacks.tradeoff import carlini_wagner, ead, strattack

__all__ = [
    "LOSSES",
    "Attack",
    "AttackOptions",
    "PixelSweep",
    "available_attacks",
    "bim",
    "carlini_wagner",
    "ead",
    "ensemble",
    "external",
    "few_pixel",
    "fgsm",
    "find_attack",
    "fmn",
    "minimal_pgd",
    "minimizes",
    "pgd",
    "pixel_sweep",
    "stored",
    "strattack",
]
