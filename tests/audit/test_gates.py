"""Gates: conditions are what Python makes of them, nothing else is run, and what is unknown never passes."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakspot.audit.findings.gates import Condition, judge, junit

NAMES = ("attack", "robust_accuracy", "low", "images")
ROW = {"attack": "pgd", "robust_accuracy": 0.31, "low": 0.2, "images": 40}
LEAVES = st.sampled_from(["robust_accuracy", "low", "images", "0.25", "3", "-1"])
SUMS = st.recursive(
    LEAVES, lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner), max_leaves=4
)
CONDITIONS = st.recursive(
    st.builds("({} {} {})".format, SUMS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), SUMS),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner),
        st.builds("(not {})".format, inner),
    ),
    max_leaves=4,
)


@given(CONDITIONS)
def test_conditions_equal_python_expressions(text: str) -> None:
    verdicts = Condition(text, NAMES).judge(ROW, "pgd")
    assert verdicts.failed == eval(text, {}, dict(ROW))  # noqa: S307 - made above


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robust_acuracy < 0.4", "got 'robust_acuracy' (did you mean 'robust_accuracy'"),
        ("", "must be a condition such as robust_accuracy < 0.4, got"),
        ("robust_accuracy <", "must be a condition such as robust_accuracy < 0.4, got"),
        ("robust_accuracy", "must compare something"),
        ("robust_accuracy - 1", "must compare something"),
        ("-low", "must compare something"),
        ("__import__('os').system('true') == 0", "must consist of column names"),
        ("attack.__class__ == 3", "must consist of column names"),
        ("low < [1][0]", "must consist of column names"),
        ("(lambda: 1)() == 1", "must consist of column names"),
        ("images ** images > 3", "must consist of column names"),
        ("attack in 'pgd'", "must consist of column names"),
        ("low < None", "must hold numbers and texts only, got"),
        ("low < 1j", "must hold numbers and texts only, got"),
        ("low\x00 < 1", "must be a condition such as robust_accuracy < 0.4, got"),
        ("(" * 5000 + "low < 1" + ")" * 5000, "must be a condition such as robust_accuracy < 0.4, got"),
    ],
)
def test_other_texts_are_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="fail-if ") as raised:
        Condition(text, NAMES)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value).replace(text, "")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_an_unknown_value_fails_the_gate(missing: float | None) -> None:
    verdicts = Condition("robust_accuracy < 0.4", NAMES).judge({**ROW, "robust_accuracy": missing}, "pgd")
    assert verdicts.failed
    assert verdicts.why == "robust_accuracy is not known, so robust_accuracy < 0.4 cannot be judged"
    # ... but not where it does not decide
    assert not Condition("attack == 'none' and low < 1", NAMES).judge({**ROW, "low": missing}, "pgd").failed


def test_a_value_beside_its_limit_is_not_rounded_to_it() -> None:
    def why(text: str, value: float) -> str:
        return Condition(text, NAMES).judge({**ROW, "robust_accuracy": value}, "pgd").why

    assert why("robust_accuracy < 0.4", 0.39999).endswith("robust_accuracy is 0.39999")
    assert why("robust_accuracy < -0.4", -0.400004).endswith("robust_accuracy is -0.400004")
    assert why("robust_accuracy < 0.4", 1 / 3).endswith("robust_accuracy is 0.3333")
    assert why("robust_accuracy < 0.4", 0.4).endswith("robust_accuracy is 0.4")


@pytest.mark.parametrize("text", ["attack < 3", "attack == 3", "low / 0 < 1", "attack * 2 < 1 + attack"])
def test_a_condition_that_cannot_be_judged_fails_the_gate(text: str) -> None:
    assert Condition(text, NAMES).judge(ROW, "pgd").failed


def test_every_condition_is_judged_on_every_row_and_no_rows_fail() -> None:
    rows = pd.DataFrame([ROW, {**ROW, "robust_accuracy": 0.6}])
    verdicts = judge(
        ["robust_accuracy < 0.4", "images < 10"], rows, lambda row: f"at {row['robust_accuracy']}"
    )
    assert [(one.row, one.failed) for one in verdicts] == [
        ("at 0.31", True), ("at 0.6", False), ("at 0.31", False), ("at 0.6", False)
    ]  # fmt: skip
    assert verdicts[0].why == "robust_accuracy < 0.4: robust_accuracy is 0.31"
    (nothing,) = judge(["images < 10"], rows.iloc[:0], str)
    assert nothing.failed


def test_junit_counts_failures_and_escapes_any_text() -> None:
    rows = pd.DataFrame([{**ROW, "attack": "odd"}, ROW])
    odd = 'p<g>&"d\x00\x1b\ud800'
    verdicts = judge(
        ["robust_accuracy < 0.4 and attack != 'pgd'"],
        rows,
        lambda row: odd if row["attack"] == "odd" else "pgd",
    )
    text = junit(verdicts, "audit <x>")
    root = ET.fromstring(text.encode())  # noqa: S314 - ours
    assert root.attrib["failures"] == "1"
    assert root.attrib["tests"] == "2"
    cases = root.findall("testsuite/testcase")
    assert [case.find("failure") is not None for case in cases] == [True, False]
    assert cases[0].attrib["classname"] == 'p<g>&"d???'


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("low < 0 and attack == 'fmn'", False),
        ("attack == 'fmn' and low < 0", False),
        ("low < 0 or images == 40", True),
        ("low < 0 and attack == 'pgd'", True),
        ("attack * 2 == 'pgdpgd'", True),
    ],
)
def test_an_unknown_part_counts_only_if_no_other_part_decides(text: str, failed: bool) -> None:
    assert Condition(text, NAMES).judge({**ROW, "low": float("nan")}, "pgd").failed == failed


def test_characters_beyond_the_first_plane_are_kept() -> None:
    (verdict,) = judge(["images > 1"], pd.DataFrame([ROW]), lambda _: "\U0001f431\x00")
    assert "\U0001f431?" in junit([verdict], "suite")


def test_a_sum_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="fail-if"):
        Condition("+".join(["images"] * 5000) + " > 1", NAMES)


@pytest.mark.parametrize(
    ("condition", "failures"),
    [
        ("attack == 'pgd' and low < 0.1", []),
        ("attack == 'pgd' or attack == 'fgsm'", ["a", "nothing"]),
        ("attack == 'fgsm' and low < 0.1", ["nothing"]),
        ("'fgsm' == attack and low < 0.1", ["nothing"]),
        ("(attack == 'fgsm' or attack == 'pgd') and low < 0.1", ["nothing"]),
        ("attack != 'fgsm' and low < 0.1", []),
        ("not (attack == 'fgsm') and low < 0.1", []),
    ],
)
def test_a_gate_on_what_no_row_has_does_not_pass(condition: str, failures: list[str]) -> None:
    """An attack of another name would disarm it; rows that fail are still named."""
    verdicts = judge([condition], pd.DataFrame([ROW]), lambda _: "a")
    assert [verdict.row for verdict in verdicts if verdict.failed] == failures
    if "nothing" in failures:
        assert verdicts[-1].why == f"{condition} cannot be judged: no row has attack 'fgsm'"
