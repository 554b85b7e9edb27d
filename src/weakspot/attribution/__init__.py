"""Attribution: which sites of an image a class's logit, or a lost margin, rests on."""

from weakspot.attribution.importance import class_activation, occlusion
from weakspot.attribution.integrated_gradients import margin_drop

__all__ = ["class_activation", "margin_drop", "occlusion"]
