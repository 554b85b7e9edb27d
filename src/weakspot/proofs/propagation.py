"""Affine forms of all values of a network, while one pixel of an image takes any color in a box."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weakspot.edits.engine import ROOM
from weakspot.edits.kernels import State
from weakspot.edits.rules import apply
from weakspot.edits.steps import Step
from weakspot.edits.windows import Map, Windows, as_seen, as_sites, whole
from weakspot.proofs.affine_forms import (
    Form,
    aligned,
    clamped,
    largest,
    point,
    takes_fresh,
    window_product,
    with_fresh,
    written_out,
)
from weakspot.proofs.affine_steps import BoundStep, ClampStep, LinearStep, NotSupportedError
from weakspot.proofs.rounding_errors import LARGEST, MOST_TERMS, SMALLEST, TINY, gamma, own

# Linear steps that are done on windows where `rules.apply` can; all others take whole maps.
BY_WINDOWS = {
    "convolution", "avg_pool2d", "constant_pad_nd", "slice", "cat", "add", "sub", "rsub", "mul", "div", "neg", "alias",
    "detach", "clone", "contiguous", "lift_fresh", "_to_copy",
}  # fmt: skip
PARTS: dict[str, Callable[[Form], Tensor]] = {
    "center": lambda form: form.center,
    "generators": lambda form: form.generators.flatten(0, 1),
    "radius": lambda form: form.radius,
    "magnitude": lambda form: form.magnitude,
    "nonzero": lambda form: form.nonzero.double(),
}


class Propagation:
    """Carries forms through the steps of a network, as windows of the unchanged image's maps where it can.

    Attributes:
        steps: of the network.
        clean: form of each slot for the unchanged image.
        overflows: (M,) of the last run, whether float32 may overflow.
        deep_bytes: the most memory that the generators of one box took so far, where each activation has its own.

    Args:
        steps: as above.
        logits: the last slot that is needed.
        image: (1, C, H, W) float64.
        recorded: images in the recording of the network.
        as_run: whether forms contain the network's values in float32, or in real numbers.

    Raises:
        NotSupportedError: as run, if a step sums up more than `MOST_TERMS` products.
    """

    def __init__(
        self, steps: Sequence[BoundStep], logits: int, image: Tensor, recorded: int, *, as_run: bool
    ) -> None:
        self.steps, self.as_run = steps, as_run
        terms = max((step.terms for step in steps if isinstance(step, LinearStep)), default=0)
        if as_run and terms > MOST_TERMS:
            raise NotSupportedError(f"a sum of more than {MOST_TERMS:,} products is not supported")
        self.overflows = torch.zeros(1, dtype=torch.bool)
        self.deep_bytes = 0
        self._recorded = recorded
        self._maps: dict[tuple[int, str], Map] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._last_use = _last_use(steps, logits)
        self.clean = self.run(point(image), deep=False, keep=True)
        for slot, form in self.clean.items():
            if form.center.ndim == 4:
                self._sizes[slot] = (form.center.shape[2], form.center.shape[3])

    def run(self, image: Form, *, deep: bool, keep: bool = False) -> dict[int, Form]:
        """Forms of the logits' slot, or of all slots to `keep`, given that of the image in slot 0."""
        values = {0: image}
        self.overflows = torch.zeros(len(image), dtype=torch.bool)
        for number, step in enumerate(self.steps):
            forms = [values[slot] for slot in step.value.inputs]
            # Fresh generators move one value each, as these steps can use; all others take them written out.
            if isinstance(step, LinearStep) and takes_fresh(step):
                result = self._linear(step, forms)
                result = with_fresh(step, forms[0], result, self._sizes.get(step.value.inputs[0], (1, 1)))
            elif isinstance(step, LinearStep):
                result = self._linear(step, [written_out(form) for form in forms])
            elif isinstance(step, ClampStep):
                result = clamped(written_out(forms[0]), step.low, step.high, number if deep else None)
                if self.as_run:
                    result = replace(result, radius=result.radius + limit_error(step))
            else:
                result = largest(written_out(forms[0]), step.count, 1 if forms[0].tops is None else 3)
            values[step.value.outputs[0]] = result
            if deep and len(result):
                self.deep_bytes = max(self.deep_bytes, result.generators.nbytes // len(result))
            if not keep:
                for slot in step.value.inputs:
                    if self._last_use[slot] == number:
                        values.pop(slot, None)
        return values

    def on_whole_maps(self, forms: Mapping[int, Form]) -> dict[int, Form]:
        """The forms on whole maps, their generators replaced by one that moves each value as far as all together."""
        return {
            slot: self._whole(replace(form, generators=form.spread[:, None], fresh=None), slot)
            for slot, form in forms.items()
        }

    def own_rounding(self, step: BoundStep, forms: Mapping[int, Form]) -> Tensor | float:
        """How far rounding in a step itself may move its result, given forms on whole maps; 0 if it rounds nothing."""
        if isinstance(step, LinearStep) and step.terms:
            inputs = [forms[slot] for slot in step.value.inputs]
            sums = self._on_maps(step.rounding, "magnitude", inputs)
            sums = sums if step.constant is None else sums + step.constant
            error = self._rounding(step, sums, lambda what, part: self._on_maps(what, part, inputs))
            return error * (1 + own(step.terms))
        return limit_error(step) if isinstance(step, ClampStep) else 0.0

    def _linear(self, step: LinearStep, forms: Sequence[Form]) -> Form:
        forms = aligned(forms)
        if all(form.tops is not None for form in forms) and step.value.name in BY_WINDOWS:
            result = self._by_windows(step, forms)
            if result is not None:
                return result
        generators = None
        if step.linear.name == "mm" and forms[0].tops is not None:
            generators = window_product(step, forms[0], self._sizes[step.linear.inputs[0]])
            # One generator, the sum of all, has the same magnitudes.
            forms = [replace(forms[0], generators=forms[0].spread[:, None], fresh=None)]
        whole_forms = [self._whole(form, slot) for form, slot in zip(forms, step.value.inputs, strict=True)]
        return self._on_whole(step, whole_forms, generators)

    def _on_whole(self, step: LinearStep, forms: Sequence[Form], generators: Tensor | None = None) -> Form:
        """The step on whole maps, unless its generators are known already."""
        count, many = forms[0].generators.shape[:2]

        def run(what: Step, part: str) -> Tensor:
            return self._on_maps(what, part, forms)

        center = run(step.value, "center")
        if generators is None and many:
            generators = run(step.linear, "generators").unflatten(0, (count, many))
        if generators is None:
            generators = center.new_zeros(count, 0, *center.shape[1:])
        return Form(center, generators, self._radius(step, step.constant, run), forms[0].blocks)

    def _on_maps(self, what: Step, part: str, forms: Sequence[Form]) -> Tensor:
        """A step on one of the `PARTS` of whole maps."""
        values = {slot: PARTS[part](form) for slot, form in zip(what.inputs, forms, strict=True)}
        result = what.run(values, len(values[what.inputs[0]]), self._recorded)
        value: Tensor = result[0] if what.several else result
        return value

    def _by_windows(self, step: LinearStep, forms: Sequence[Form]) -> Form | None:
        """The step on windows; None if it needs whole maps."""
        count, many = forms[0].generators.shape[:2]
        slots = step.value.inputs
        places = [(form.tops, form.lefts) for form in forms]
        # There is one unchanged image, whose maps surround all windows.
        owners = torch.zeros(count, dtype=torch.long)

        def windows(what: Step, part: str) -> Windows:
            # Each generator is a window of its own at the place of its box: (M * k, h, w, C).
            repeats = many if part == "generators" else 1
            spots = _repeated(places, repeats) if repeats > 1 else places
            values = {
                slot: Windows(PARTS[part](form), top, left)
                for slot, form, (top, left) in zip(slots, forms, spots, strict=True)
                if top is not None and left is not None
            }
            maps = {slot: self._map(slot, part) for slot in slots}
            state = State(owners.repeat_interleave(repeats), maps, self._sizes, ROOM)
            result = apply(state, what, dict(values))
            if result is None:
                raise _NeedsWholeError
            return result

        def run(what: Step, part: str) -> Tensor:
            return windows(what, part).values

        try:
            center = windows(step.value, "center")
            generators = center.values.new_zeros(count, 0, *center.values.shape[1:])
            if many:
                generators = run(step.linear, "generators").unflatten(0, (count, many))
            # Windows have their channels last, over which a flat constant broadcasts.
            constant = None if step.constant is None else step.constant.flatten()
            radius = self._radius(step, constant, run)
        except _NeedsWholeError:
            return None
        return Form(center.values, generators, radius, forms[0].blocks, center.tops, center.lefts)

    def _radius(
        self, step: LinearStep, constant: Tensor | None, run: Callable[[Step, str], Tensor]
    ) -> Tensor:
        """What the radii of the inputs become, with the rounding of the network and of the bounds themselves.

        Args:
            step: of the network.
            constant: magnitude of its constant.
            run: runs a part of the step on one of the `PARTS` of its inputs.
        """
        radius = run(step.absolute, "radius")
        if not step.terms:
            return radius
        sums = run(step.rounding, "magnitude")
        sums = sums if constant is None else sums + constant
        # Rounding in float64 of the center and the generators; the last line is for that of the radius itself.
        radius = radius + own(step.terms) * sums
        if self.as_run:
            # Negated, because NaN is below nothing and must count as an overflow.
            self.overflows |= ~(sums.flatten(1) < LARGEST).all(1)
            radius = radius + self._rounding(step, sums, run)
        return radius * (1 + own(step.terms)) + TINY

    @staticmethod
    def _rounding(step: LinearStep, sums: Tensor, run: Callable[[Step, str], Tensor]) -> Tensor:
        """How far float32 may be from the step's true sums, given the sums of magnitudes."""
        terms = torch.tensor(float(step.terms), dtype=torch.float64)
        if step.counting is not None:
            terms = run(step.counting, "nonzero") + 2
        # The last part is for products below the normal range, each of which adds less than the smallest normal number.
        return gamma(terms, torch.float32) * (1 + 2**-40) * sums + 4 * step.terms * SMALLEST

    def _map(self, slot: int, part: str) -> Map:
        """What surrounds the windows of a slot: a part of the clean form, which has no generators."""
        if (slot, part) not in self._maps:
            form = self.clean[slot]
            values = torch.zeros_like(form.center) if part == "generators" else PARTS[part](form)
            self._maps[slot, part] = Map(as_sites(values, "maps", self._sizes[slot]), "maps")
        return self._maps[slot, part]

    def _whole(self, form: Form, slot: int) -> Form:
        """The form on the whole map of a slot: outside its window nothing depends on the pixel."""
        if form.tops is None or form.lefts is None:
            return form
        tops, lefts = form.tops, form.lefts
        count, many = form.generators.shape[:2]
        owners = torch.zeros(count, dtype=torch.long)

        def pasted(values: Tensor, part: str, repeats: int = 1) -> Tensor:
            # Each generator is a window of its own at the place of its box.
            spots = (numbers.repeat_interleave(repeats) for numbers in (tops, lefts, owners))
            top, left, owner = spots
            return as_seen(whole(Windows(values, top, left), self._map(slot, part), owner), "maps")

        center = pasted(form.center, "center")
        generators = center.new_zeros(count, 0, *center.shape[1:])
        if many:
            generators = pasted(PARTS["generators"](form), "generators", many).unflatten(0, (count, many))
        # Of fresh generators only the magnitudes are needed here.
        fresh = form.fresh and replace(form.fresh, half=pasted(form.fresh.half, "generators"))
        return Form(center, generators, pasted(form.radius, "radius"), form.blocks, fresh=fresh)


class _NeedsWholeError(Exception):
    """A step cannot go by windows."""


def limit_error(step: ClampStep) -> float:
    """How far limits of a clamp move as they become float32."""
    ends = torch.tensor([step.low, step.high], dtype=torch.float64)
    moved = (ends.float().double() - ends).abs()
    # No value reaches limits beyond LARGEST.
    return float(torch.where(ends.abs() <= LARGEST, moved, 0.0).max()) * (1 + 2**-50)


def _repeated(
    spots: Sequence[tuple[Tensor | None, Tensor | None]], repeats: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Places repeated for each generator; equal tensors stay the same tensor, which is cheaper to compare."""
    done: dict[int, Tensor] = {}
    for pair in spots:
        for place in pair:
            if place is not None and id(place) not in done:
                done[id(place)] = place.repeat_interleave(repeats)
    return [(None if a is None else done[id(a)], None if b is None else done[id(b)]) for a, b in spots]


def _last_use(steps: Sequence[BoundStep], logits: int) -> dict[int, int]:
    last = {slot: number for number, step in enumerate(steps) for slot in step.value.inputs}
    # Beyond the last step, so that the logits are never dropped.
    return last | {logits: len(steps)}
