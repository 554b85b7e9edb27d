"""The explorer: ask the network with your own hand. A bench for one image and a gallery for audits, in a browser."""

from weakspot.explorer.view import View, explore

__all__ = ["View", "explore"]
