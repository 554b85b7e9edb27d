"""Budgets as text: valid texts mean what they say, and any other is refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.budgets.strategies import LAW, limit
from weakspot.budgets import L1, L2, SSIM, Budget, Linf, read_budget

KINDS: dict[str, Callable[[float], Budget]] = {
    "linf": Linf,
    "l2": L2,
    "l1": L1,
    "ssim": SSIM,
    "ssim-local": lambda eps: SSIM(eps, mode="local"),
}
kinds = st.sampled_from(sorted(KINDS))


@LAW
@given(kinds, st.integers(0, 254), st.integers(255, 1000))
def test_a_fraction_is_divided(kind: str, above: int, below: int) -> None:
    assert read_budget(f"{kind}:{above}/{below}") == KINDS[kind](above / below)


@LAW
@given(kinds, st.floats(0, 1, exclude_max=True), st.sampled_from(["{!r}", "{:.17f}", "{:e}"]))
def test_a_number_is_taken_as_python_writes_it(kind: str, eps: float, form: str) -> None:
    text = form.format(eps)
    if float(text) < 1:
        assert read_budget(f"{kind}:{text}") == KINDS[kind](float(text))


@LAW
@given(kinds, st.sampled_from(["", " ", "  ", "\t", "\n"]), st.booleans())
def test_case_and_space_around_change_nothing(kind: str, space: str, upper: bool) -> None:
    name = kind.upper() if upper else kind
    assert read_budget(f"{space}{name}:{space}4/255{space}") == KINDS[kind](4 / 255)


@LAW
@given(st.text() | st.builds("{}:{}".format, kinds | st.text(max_size=6), st.text(max_size=8)))
@example("linf:")
@example(":")
@example("l2:1/0")
@example("l1:nan")
@example("l1:inf")
@example("l2:1e400")
@example("l2:-1")
@example("ssim:1")
@example("linf:8")
@example("linf:1/255/255")
@example("linf 4/255")
def test_any_other_text_is_refused_in_one_sentence_that_names_the_budget(text: str) -> None:
    try:
        budget = read_budget(text)
    except ValueError as error:
        words = str(error)
        assert words.startswith(("budget must ", "budget kind must ", "eps must "))
        assert "\n" not in words
    else:
        amount = limit(budget)
        assert 0 <= amount < math.inf
        assert amount == float(Fraction(text.partition(":")[2].strip()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4/255", r"^budget must be KIND:AMOUNT, got '4/255'"),
        ("", r"^budget must be KIND:AMOUNT, got ''"),
        ("linff:4/255", r"^budget kind must .* got 'linff' \(did you mean 'linf'\?\)$"),
        ("l0:3", r"^budget kind must be one of linf, l2, l1.* got 'l0'"),
        ("norm:3", r"^budget kind must be one of linf, l2, l1, ssim, ssim-local.* got 'norm'$"),
        ("linf:four", r"^budget must end with a number or a fraction, got 'linf:four'"),
        ("l2:1e99999999", r"^(budget|eps) must"),  # a number whose digits fill the memory
        ("linf:8", r"^eps must be between 0 and 1, got 8\.0 \(did you mean 8/255\?\)$"),
        ("ssim-local:2", r"^eps must be at least 0 and below 1, .*got 2\.0"),
    ],
)
def test_a_refusal_names_the_valid_form(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_budget(text)
