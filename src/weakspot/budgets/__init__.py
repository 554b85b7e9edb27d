"""Budgets: how much an image may change."""

from weakspot.budgets.budget import Budget
from weakspot.budgets.norms import L1, L2, Linf
from weakspot.budgets.reading import read_budget
from weakspot.budgets.similarity import SSIM

__all__ = ["L1", "L2", "SSIM", "Budget", "Linf", "read_budget"]
