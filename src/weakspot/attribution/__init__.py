"""Attribution: which sites of an image a class's logit, or a lost margin, rests on."""

from weakspot.attribution.cam import class_activation
from weakspot.attribution.integrated_gradients import margin_drop
from weakspot.attribution.occlusion_map import occlusion

__all__ = ["class_activation", "margin_drop", "occlusion"]
