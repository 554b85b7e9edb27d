"""weakspot finds where an image classifier is weak, why, and what helps."""

__version__ = "0.1.0"
