"""Attacks: images come in, AttackResults go out."""

from weakspot.attacks.gradient import fgsm, pgd

__all__ = ["fgsm", "pgd"]
