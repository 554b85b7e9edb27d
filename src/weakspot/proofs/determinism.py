"""What every certificate assumes: an image gets the same logits each time, whatever else is in the batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload

from weakspot._checks import check_finite
from weakspot._state import DispatchMode
from weakspot.classifier import Classifier
from weakspot.logits import filled, logit_scale, probe_images

TOLERANCE = 1e-4  # of the range of the logits
OTHER_DEVICES = 1e-2  # the same on GPUs, which may round to TF32
HALF_PRECISION = 16  # the same for weights in half precision, in units of their rounding


def check_deterministic(classifier: Classifier, image: Tensor) -> None:
    """Try one image alone, again, and among others.

    Args:
        classifier: the network to be certified.
        image: (1, C, H, W).

    Raises:
        ValueError: if the network draws random numbers, or the logits of the image differ by more than rounding.
        NotFiniteError: a ValueError, if they are not finite.
    """
    size = classifier.fixed_batch or 4
    others = torch.cat([image, probe_images(image)])[:size]
    draws = _Draws()
    with torch.no_grad():
        with draws:
            alone = classifier(classifier.filled(image))[:1]
        again = classifier(classifier.filled(image))[:1]
        among = classifier(filled(others, size))[:1]
    check_finite(alone, classifier.name)
    allowed = _tolerance(classifier) * float(logit_scale(alone))
    cause = (
        f"draws random numbers ({draws.function})" if draws.function
        else "gives the same image other logits when asked again" if _differ(alone, again, allowed)
        else "gives an image other logits beside other images" if _differ(alone, among, allowed)
        else ""
    )  # fmt: skip
    if cause:
        raise ValueError(
            f"the network must give an image the same logits each time to be certified, but {classifier.name} {cause}"
        )


class _Draws(DispatchMode):
    """Notes a function that draws from a global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.function = ""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        del types
        # Attention carries the tag because of dropout, which is off in eval mode.
        drawing = torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func)
        if drawing and (kwargs or {}).get("generator") is None:
            self.function = str(func)
        return func(*args, **(kwargs or {}))


def _differ(first: Tensor, second: Tensor, allowed: float) -> bool:
    return not torch.allclose(first, second, rtol=0, atol=allowed)


def _tolerance(classifier: Classifier) -> float:
    tensors = (*classifier.parameters(), *classifier.buffers())
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)
    half = HALF_PRECISION * coarsest if coarsest > 1e-6 else 0.0
    return max(TOLERANCE if classifier.mean.device.type == "cpu" else OTHER_DEVICES, half)
