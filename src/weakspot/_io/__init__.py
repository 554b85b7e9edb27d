"""Atomic files, locks of folders, files behind URLs."""
