"""Attribution: which sites of an image a class's logit, or a lost margin, rests on."""

from weakspot.attribution.cam import class_activation
from weakspot.attribution.occlusion import occlusion
from weakspot.attribution.path import margin_drop

__all__ = ["class_activation", "margin_drop", "occlusion"]
