"""Sound bounds of an image's margins while one pixel takes any color in a box, for many pixels and boxes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weakspot.edits.engine import ROOM
from weakspot.edits.kernels import State
from weakspot.edits.rules import apply
from weakspot.edits.steps import Step
from weakspot.edits.windows import Map, Windows, as_seen, as_sites, whole
from weakspot.proofs.affine_forms import Form, aligned, clamped, largest, point, written_out
from weakspot.proofs.linear_steps import (
    BoundStep,
    ClampStep,
    LinearStep,
    MaxStep,
    differences,
)
from weakspot.proofs.network_steps import BoundNetwork
from weakspot.proofs.rounding_errors import LARGEST, SMALLEST, TINY, gamma, own
from weakspot.proofs.sparse_generators import takes_fresh, window_product, with_fresh

BY_WINDOWS = {
    "convolution", "avg_pool2d", "constant_pad_nd", "slice", "cat", "add", "sub", "rsub", "mul", "div", "neg", "alias",
    "detach", "clone", "contiguous", "lift_fresh", "_to_copy",
}  # fmt: skip


@dataclass(frozen=True)
class Margins:
    """Bounds of z_label - z_other for every other class, over M boxes.

    Attributes:
        lower: (M, K - 1) float64, rounded down.
        upper: (M, K - 1) float64, rounded up.
    """

    lower: Tensor
    upper: Tensor

    @property
    def bound(self) -> Tensor:
        """(M,) lower bound of the margin to the nearest class."""
        return self.lower.amin(1)


class MarginBounds:
    """Bounds of the margins of one image, one pixel of which may take any color in a box.

    Attributes:
        deep_bytes: the most memory that the generators of one box took so far, where each activation has its own.

    Args:
        network: as steps on affine forms.
        image: (1, C, H, W).
        label: of the image.
        as_run: whether bounds hold for the network in float32, or for the network in real numbers.
    """

    def __init__(self, network: BoundNetwork, image: Tensor, label: int, *, as_run: bool) -> None:
        self.network, self.label, self.as_run = network, label, as_run
        self.image = image.detach().cpu().double()
        self._steps = list(network.steps)
        if network.last is not None:
            merged = differences(network.last, label)
            self._steps = [*self._steps, merged] if merged else self._steps
        self.deep_bytes = 0
        self._clean: dict[int, Form] = {}
        self._maps: dict[tuple[int, float], Map] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._last_use = _last_use(self._steps, network.logits)
        self._overflows = torch.zeros(1, dtype=torch.bool)
        self._clean = self._run({0: point(self.image)}, deep=False, keep=True)
        self._clean_overflows = bool(self._overflows.any())
        for slot, form in self._clean.items():
            if form.center.ndim == 4:
                self._sizes[slot] = (form.center.shape[2], form.center.shape[3])
        self._clean_margins = self._margins(self._clean[network.logits])

    @property
    def clean(self) -> Margins:
        """Bounds of the unchanged image, M = 1."""
        return self._clean_margins

    def bounds(
        self, rows: Tensor, columns: Tensor, low: Tensor, high: Tensor, *, deep: bool = False
    ) -> Margins:
        """Bounds over boxes of colors low to high, (M, C) each in float64, of pixels at rows and columns (M,).

        Args:
            rows: of the pixels.
            columns: of the pixels.
            low: lowest value of each channel.
            high: highest value of each channel.
            deep: whether each unstable activation gets a generator of its own: tighter, and slower.
        """
        count, channels = low.shape
        center = (low + high) / 2
        # Rounded up: the box must lie inside center -+ reach.
        reach = torch.maximum(high - center, center - low) * (1 + 2**-50)
        reach = torch.where(high > low, reach + TINY, 0.0)
        form = Form(
            center.view(count, 1, 1, channels),
            torch.diag_embed(reach).view(count, channels, 1, 1, channels),
            center.new_zeros(count, 1, 1, channels),
            ((-1, channels),),
            rows,
            columns,
        )
        return self._margins(self._run({0: form}, deep=deep)[self.network.logits])

    def _margins(self, logits: Form) -> Margins:
        """Margins of the form of the logits, or of their differences if the last step made those."""
        form = written_out(logits)
        if self.network.last is None:
            flat = form.with_values(
                form.center.flatten(1), form.generators.flatten(2), form.radius.flatten(1)
            )
            others = [k for k in range(flat.center.shape[1]) if k != self.label]
            own_part = slice(self.label, self.label + 1)
            center = flat.center[:, own_part] - flat.center[:, others]
            generators = flat.generators[:, :, own_part] - flat.generators[:, :, others]
            radius = flat.radius[:, own_part] + flat.radius[:, others]
            sizes = flat.magnitude[:, own_part] + flat.magnitude[:, others]
            form = flat.with_values(center, generators, radius * (1 + 2**-50) + own(2) * sizes)
        lower, upper = form.ends
        # Where float32 may overflow, or float64 did, nothing is known.
        unbounded = self._overflows | self._clean_overflows | (lower.isnan() | upper.isnan()).any(1)
        lower = lower.masked_fill(unbounded[:, None], -torch.inf)
        upper = upper.masked_fill(unbounded[:, None], torch.inf)
        return Margins(lower, upper)

    def _run(self, values: dict[int, Form], *, deep: bool, keep: bool = False) -> dict[int, Form]:
        self._overflows = torch.zeros(len(values[0]), dtype=torch.bool)
        for number, step in enumerate(self._steps):
            source = step.value if isinstance(step, LinearStep) else step.step
            forms = [values[slot] for slot in source.inputs]
            if isinstance(step, LinearStep) and takes_fresh(step):
                result = self._linear(step, forms)
                result = with_fresh(step, forms[0], result, self._sizes.get(source.inputs[0], (1, 1)))
            elif isinstance(step, LinearStep):
                result = self._linear(step, [written_out(form) for form in forms])
            elif isinstance(step, ClampStep):
                result = clamped(written_out(forms[0]), step.low, step.high, number if deep else None)
                if self.as_run:
                    result = replace(result, radius=result.radius + limit_error(step))
            else:
                result = self._largest(step, written_out(forms[0]))
            values[source.outputs[0]] = result
            if deep and len(result):
                self.deep_bytes = max(self.deep_bytes, result.generators.nbytes // len(result))
            if not keep:
                for slot in source.inputs:
                    if self._last_use[slot] == number:
                        values.pop(slot, None)
        return values

    @staticmethod
    def _largest(step: MaxStep, form: Form) -> Form:
        return largest(form, step.count, 1 if form.tops is None else 3)

    def _linear(self, step: LinearStep, forms: Sequence[Form]) -> Form:
        forms = aligned(forms)
        # Rounding of the network itself, and of the bounds: a part of the sum of magnitudes.
        factor = own(step.terms) if step.terms else 0.0
        if self.as_run and step.terms:
            factor += gamma(step.terms, torch.float32) * (1 + 2**-40)
        if all(form.tops is not None for form in forms) and step.value.name in BY_WINDOWS:
            result = self._by_windows(step, forms, factor)
            if result is not None:
                return result
        generators = None
        if step.linear.name == "mm" and forms[0].tops is not None:
            generators = window_product(step, forms[0], self._sizes[step.linear.inputs[0]])
            # One generator, the sum of all, has the same magnitudes.
            forms = [replace(forms[0], generators=forms[0].spread[:, None], fresh=None)]
        whole_forms = [self._whole(form, slot) for form, slot in zip(forms, step.value.inputs, strict=True)]
        return self._on_whole(step, whole_forms, factor, generators)

    def _on_whole(
        self, step: LinearStep, forms: Sequence[Form], factor: float, generators: Tensor | None = None
    ) -> Form:
        """The step on whole maps, unless its generators are known already."""
        count, recorded = len(forms[0]), self.network.recording.count
        many = forms[0].generators.shape[1]
        slots = step.value.inputs

        def run(what: Step, values: Sequence[Tensor]) -> Tensor:
            result = what.run(dict(zip(slots, values, strict=True)), len(values[0]), recorded)
            value: Tensor = result[0] if what.several else result
            return value

        center = run(step.value, [form.center for form in forms])
        if generators is None:
            generators = center.new_zeros(count, 0, *center.shape[1:])
            if many:
                generators = run(step.linear, [form.generators.flatten(0, 1) for form in forms])
                generators = generators.unflatten(0, (count, many))
        if step.rounding is step.absolute:
            radius = run(step.absolute, [self._noise(form.radius, form.magnitude, factor) for form in forms])
        else:
            radius = run(step.absolute, [form.radius for form in forms])
            radius = radius + run(step.rounding, [self._noise(0.0, form.magnitude, factor) for form in forms])
        return Form(center, generators, self._finished(step, radius, step.constant, factor), forms[0].blocks)

    @staticmethod
    def _noise(radius: Tensor | float, magnitude: Tensor, factor: float) -> Tensor:
        return radius + factor * magnitude if factor else radius + torch.zeros_like(magnitude)

    def _finished(self, step: LinearStep, radius: Tensor, constant: Tensor | None, factor: float) -> Tensor:
        """The radius with the rounding of the constant, of underflow, and of itself."""
        if not step.terms:
            return radius
        if constant is not None:
            radius = radius + factor * constant
        if self.as_run:
            # The radius is at least `factor` times the sum of magnitudes.
            self._overflows |= ~(radius.flatten(1) < factor * LARGEST).all(1)
            radius = radius + 4 * step.terms * SMALLEST
        return radius * (1 + own(step.terms)) + TINY

    def _by_windows(self, step: LinearStep, forms: Sequence[Form], factor: float) -> Form | None:
        """The step on windows; None if it needs whole maps."""
        count, many = len(forms[0]), forms[0].generators.shape[1]
        slots = step.value.inputs
        owners = torch.zeros(count, dtype=torch.long)

        def run(what: Step, parts: Sequence[Tensor], repeats: int, maps: dict[int, Map]) -> Windows | None:
            spots = [(form.tops, form.lefts) for form in forms]
            if repeats > 1:
                spots = _repeated(spots, repeats)
            windows = {
                slot: Windows(part, top, left)
                for slot, part, (top, left) in zip(slots, parts, spots, strict=True)
                if top is not None and left is not None
            }
            state = State(
                owners.repeat_interleave(repeats) if repeats > 1 else owners, maps, self._sizes, ROOM
            )
            return apply(state, what, dict(windows))

        center = run(
            step.value, [form.center for form in forms], 1, {slot: self._map(slot, -1.0) for slot in slots}
        )
        if center is None:
            return None
        maps = {slot: self._map(slot, -2.0) for slot in slots}
        generators = center.values.new_zeros(count, 0, *center.values.shape[1:])
        if many:
            linear = run(step.linear, [form.generators.flatten(0, 1) for form in forms], many, maps)
            if linear is None:
                return None
            generators = linear.values.unflatten(0, (count, many))
        noise = [self._noise(form.radius, form.magnitude, factor) for form in forms]
        spread = run(step.absolute, noise, 1, {slot: self._map(slot, factor) for slot in slots})
        if spread is None:
            return None
        constant = None if step.constant is None else step.constant.flatten()
        radius = self._finished(step, spread.values, constant, factor)
        return Form(center.values, generators, radius, forms[0].blocks, center.tops, center.lefts)

    def _map(self, slot: int, kind: float) -> Map:
        """What surrounds the windows of a slot: clean centers (-1), zeros (-2), or radii with rounding (a factor)."""
        if (slot, kind) not in self._maps:
            form = self._clean[slot]
            values = (
                form.center
                if kind == -1
                else torch.zeros_like(form.center)
                if kind == -2
                else self._noise(form.radius, form.magnitude, kind)
            )
            self._maps[slot, kind] = Map(as_sites(values, "maps", self._sizes[slot]), "maps")
        return self._maps[slot, kind]

    def _whole(self, form: Form, slot: int) -> Form:
        """The form on the whole map of a slot: outside its window nothing depends on the pixel."""
        if form.tops is None or form.lefts is None:
            return form
        count, many = form.generators.shape[:2]
        owners = torch.zeros(count, dtype=torch.long)

        def pasted(values: Tensor, kind: float, repeats: int) -> Tensor:
            (place,) = _repeated([(form.tops, form.lefts)], repeats)
            windows = Windows(values, *place)  # type: ignore[arg-type]
            return as_seen(whole(windows, self._map(slot, kind), owners.repeat_interleave(repeats)), "maps")

        center = pasted(form.center, -1.0, 1)
        generators = center.new_zeros(count, 0, *center.shape[1:])
        if many:
            generators = pasted(form.generators.flatten(0, 1), -2.0, many).unflatten(0, (count, many))
        # Of fresh generators only the magnitudes are needed here.
        fresh = form.fresh and replace(form.fresh, half=pasted(form.fresh.half, -2.0, 1))
        return Form(center, generators, pasted(form.radius, 0.0, 1), form.blocks, fresh=fresh)


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
    last = {}
    for number, step in enumerate(steps):
        source = step.value if isinstance(step, LinearStep) else step.step
        for slot in source.inputs:
            last[slot] = number
    last[logits] = len(steps)
    return last
