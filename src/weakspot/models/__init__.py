"""Models by name: `load("efficientnet_lite0")`, `load("package.module:factory")`, `load("model.pt2")`."""

from weakspot.models.specs import available_models, load

__all__ = ["available_models", "load"]
