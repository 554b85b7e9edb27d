"""Budgets: how much an image may change."""

from weakspot.budgets.base import Budget, PreparedBudget, prepare
from weakspot.budgets.norms import L1, L2, Linf
from weakspot.budgets.parse import read_budget
from weakspot.budgets.ssim import SSIM

__all__ = ["L1", "L2", "SSIM", "Budget", "Linf", "PreparedBudget", "prepare", "read_budget"]
