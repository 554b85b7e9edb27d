"""Sections of a run's report, from frames that are made up: what is said follows from the numbers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from math import nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert

from weakspot.audit.findings.contrasts import Contrast, contrast_sentences
from weakspot.audit.findings.curves import BUDGET_COLUMNS
from weakspot.audit.findings.distributions import Classes, Extremes
from weakspot.audit.findings.outcomes import CellSummary
from weakspot.audit.findings.scores import Finding
from weakspot.audit.findings.summary import strongest_attack_sentence
from weakspot.audit.page.charts import (
    CONFIG,
    budget_chart,
    confusion_chart,
    histogram_chart,
    layer_chart,
    robust_chart,
)
from weakspot.audit.page.elements import Section, Thumbnail
from weakspot.audit.page.outcome_sections import (
    budget_section,
    class_section,
    class_sentences,
    image_section,
    image_sentences,
    robust_section,
)
from weakspot.audit.page.run_page import SHOWN, Header, Queries, run_page
from weakspot.audit.page.score_sections import finding_section, layer_section
from weakspot.statistics.number_format import with_interval

CONFUSIONS = pd.DataFrame(columns=["attack", "region", "label", "adversarial_class", "fooled"])
NONE = pd.DataFrame(columns=list(Contrast._fields))


def curves(**changes: Any) -> pd.DataFrame:
    rows = [
        {
            "attack": "pgd", "region": region, "control": control, "norm": "linf", "size": size, "fooled": fooled,
            "low": fooled - 0.1, "high": min(1.0, fooled + 0.1), "images": 50, **changes,
        }
        for region, control, shares in (("cam", False, (0.2, 0.6, 0.9)), ("matched:cam", True, (0.1, 0.2, 0.4)))
        for size, fooled in zip((0.01, 0.02, 0.04), shares, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(BUDGET_COLUMNS))


def contrast(q: float) -> pd.DataFrame:
    rows = [
        ("pgd", "cam", *kind, 0.3, 0.3, 50, "fooled", "", 0.6, 0.2, 0.0, 0.0, 0.4, 0.3, 0.5, q, q)
        for kind in (("other images", 5), ("shifted", 1))
    ]
    return pd.DataFrame(rows, columns=list(Contrast._fields))


def page(*sections: Section) -> str:
    return run_page(Header("title", "", "", [], []), sections, {}, Queries("", ""))


def test_an_empty_section_names_the_option_that_fills_it() -> None:
    bare = budget_section(pd.DataFrame(columns=list(BUDGET_COLUMNS)), NONE)
    assert len(bare.sentences) == 1
    assert "--controls" in bare.sentences[0]
    assert not bare.charts
    (planned,) = budget_section(pd.DataFrame(columns=list(BUDGET_COLUMNS)), NONE, planned=True).sentences
    assert "--" not in planned  # the attack is there, but no image was correctly classified
    assert "--analyses" in finding_section(pd.DataFrame(columns=list(Finding._fields))).sentences[0]
    assert "--analyses propagation" in layer_section(pd.DataFrame()).sentences[0]


def test_the_size_that_fools_half_equals_the_curve() -> None:
    section = budget_section(curves(), contrast(0.001), contrast_sentences(contrast(0.001)))
    assert section.sentences[0] == (
        "Size (linf) at which pgd has fooled half of the correctly classified images: confined to cam, 5.1/255; "
        "confined to matched:cam, none of the tested sizes."
    )
    assert section.sentences[1].endswith("a weak region.")
    assert [row[2].text for row in section.tables[0].rows] == ["other images (5)", "shifted"]
    (cam, control) = section.tables[1].rows
    assert [cell.text for cell in cam][:8] == ["pgd", "linf", "cam", "no", "50", "0.02", "0.02", "0.04"]
    assert [cell.text for cell in control][5:9] == ["0.04", "", "", "0.04"]
    drawn: Any = section.charts[0].spec
    assert len(next(iter(drawn["datasets"].values()))) == 6
    dashes = drawn["layer"][1]["encoding"]["strokeDash"]["scale"]
    assert dashes["range"][0] == [1, 0]
    assert dashes["range"][1] != [1, 0]


def test_without_controls_the_page_warns_about_area_and_place() -> None:
    message = budget_section(curves(), NONE).sentences[-1]
    assert "because of its area or its position; --controls adds them" in message
    assert len(budget_section(pd.DataFrame(columns=list(BUDGET_COLUMNS)), contrast(0.5)).tables) >= 1


def test_no_difference_is_claimed_if_there_is_none() -> None:
    assert "not shown to be weaker" in contrast_sentences(contrast(0.5))[0]
    assert "weak region" not in " ".join(
        budget_section(curves(), contrast(0.5), contrast_sentences(contrast(0.5))).sentences
    )


def finding(
    score: str, q: float, null: float = 0.2, region: str = "none", excess: float = 0.3
) -> dict[str, Any]:
    return {
        "attack": "pgd", "region": region, "score": score, "images": 50, "mean": 0.5, "low": 0.4, "high": 0.6,
        "null": null, "excess": excess, "excess_low": excess - 0.1, "excess_high": excess + 0.1, "p": q,
        "compared": 48, "alone": 7, "against": "other images", "shifted": 0.1, "q": q,
    }  # fmt: skip


def findings(*rows: dict[str, Any]) -> Section:
    return finding_section(pd.DataFrame(list(rows), columns=list(Finding._fields)))


def test_other_scores_are_counted_by_q_alone_and_none_is_called_equal() -> None:
    own = {"against": "its null"}
    # Equal differences in all images have no interval.
    equal = finding("ssim", 0.01) | own | {"excess_low": nan, "excess_high": nan}
    (count, value) = findings(equal, finding("depth", 0.5) | own).sentences
    assert count.startswith("Of 2 other mean scores tested against a null value, 1 differs from it")
    assert "(difference 0.3, 48 images)" in value
    (count,) = findings(finding("depth", 0.5) | own).sentences
    assert "none was shown to differ from it (q at most .05)" in count


def test_an_attack_acts_where_the_network_looks_if_it_beats_other_images() -> None:
    known = ("attack", "region", "score", "images", "mean", "low", "high")
    bare = {name: nan for name in Finding._fields if name not in known} | {"against": ""}
    section = findings(
        finding("effect_in_roi", 0.002), finding("jaccard", 0.3), finding("margin_drop", nan) | bare
    )
    assert section.sentences == [
        ("pgd on the whole image acts more where the network looks than other images' importance maps would predict: "
        "effect in roi is 0.5 with the image's own map and 0.2 with other images' maps (48 images, q = .002); 7 of 48 "
        "images are individually significant (q over images at most .1).")
    ]  # fmt: skip
    assert [cell.text for cell in section.tables[0].rows[2]][5:] == [""] * 6


def test_an_attack_that_does_not_beat_other_images_is_not_said_to_act_there() -> None:
    (weak,) = findings(finding("effect_in_roi", 0.2), finding("spearman", 0.06)).sentences
    assert (
        "There is not enough evidence that pgd on the whole image acts more, or less, where the network looks"
        in weak
    )
    (apart,) = findings(finding("effect_in_roi", 0.01), finding("spearman", 0.01, excess=-0.3)).sentences
    assert "the statistics differ in direction" in apart
    (away,) = findings(finding("effect_in_roi", 0.01, excess=-0.3)).sentences
    assert "acts less where the network looks" in away
    assert "individually" not in away


def cells(*robust: float, **changes: Any) -> list[CellSummary]:
    return [
        CellSummary(
            attack="pgd",
            budget=None,
            region=f"region {number}",
            region_fraction=0.1 * number,
            images=9,
            robust_accuracy=value,
            low=max(0.0, value - 0.1),
            high=min(1.0, value + 0.1),
            errors=0,
            **changes,
        )
        for number, value in enumerate(robust)
    ]


@pytest.mark.parametrize("robust", [(0.2, 0.9), (0.9, 0.2), (0.5, 0.55)])
def test_regions_are_listed_and_not_ranked(robust: tuple[float, float]) -> None:
    (sentence,) = robust_section(cells(*robust), 0.95).sentences
    first, other = (with_interval(one, max(0, one - 0.1), min(1, one + 0.1)) for one in robust)
    assert sentence == (
        f"Under pgd confined to region 0 (0% of the image), {first} of 9 images remain correctly classified (95% "
        f"without an attack); confined to region 1 (10% of the image), {other}."
    )


def test_regions_with_fewer_known_outcomes_say_so() -> None:
    first, other = cells(0.5, 0.5)
    (sentence,) = robust_section([first, replace(other, images=1)], 1.0).sentences
    assert sentence.endswith("confined to region 1 (10% of the image), 50% [40%, 60%] of 1 image.")


def test_less_than_half_is_said_with_the_largest_size() -> None:
    (rare, _) = budget_section(curves(fooled=0.2), NONE).sentences
    assert rare == (
        "Up to 10/255, the largest size (linf) in the run, pgd fools less than half of the correctly classified images "
        "in every region."
    )


def test_many_regions_are_in_the_table() -> None:
    section = robust_section(cells(*[0.5] * 9), 1.0)
    assert section.sentences[0].endswith(
        "confined to region 5 (50% of the image), 50% [40%, 60%]; the table lists the other regions."
    )
    assert "region 6" not in section.sentences[0]
    assert len(section.tables[0].rows) == 9


def test_an_attack_without_robust_accuracy_is_named_and_left_out_of_the_chart() -> None:
    pgd, other = cells(0.5, math.nan)
    fmn = replace(other, attack="fmn", low=math.nan, high=math.nan)
    section = robust_section([replace(pgd, budget="linf:4/255"), fmn], 1.0)
    assert section.sentences[0].startswith(
        "Under pgd at linf:4/255 confined to region 0 (0% of the image), 50%"
    )
    assert section.sentences[1].startswith("fmn is a minimal-norm attack and has no robust accuracy")
    assert "fmn" not in str(section.charts[0].spec)
    assert not robust_section([fmn], 1.0).charts
    (unknown,) = robust_section([replace(fmn, attack="mine", known=False)], 1.0).sentences
    assert unknown.startswith("The robust accuracy under mine is unknown")
    assert "minimal-norm" not in unknown


def test_an_attack_without_a_budget_is_named_without_one() -> None:
    """pandas turns a missing budget into NaN as soon as another attack has one."""
    pgd, other = cells(0.5, 0.4)
    section = robust_section([replace(pgd, budget="linf:4/255"), replace(other, attack="few_pixel")], 1.0)
    assert section.sentences[1].startswith("Under few_pixel confined to region 1")
    assert section.tables[0].rows[1][1].text == ""


def test_a_network_that_is_wrong_without_an_attack_is_not_called_weak() -> None:
    for sentence in (
        robust_section(cells(0.0), 0.0).sentences[0],
        strongest_attack_sentence(cells(0.0), 0.0),
    ):
        assert sentence.startswith("No image is classified as its label without an attack")
    assert "nothing to show" not in strongest_attack_sentence(cells(0.0), 0.5)


def test_a_network_that_is_robust_in_its_regions_is_not_hidden_behind_them() -> None:
    """The attack on the whole image is named, too, and the interval says how few images there are."""
    whole = replace(cells(0.2)[0], region="none")
    text = strongest_attack_sentence([*cells(1.0), whole], 1.0)
    assert text == (
        "None of 9 images was fooled by pgd confined to a region (region 0): robust accuracy is 100% [90%, 100%]; "
        "under pgd on the whole image, 20% [10%, 30%]."
    )
    assert not strongest_attack_sentence(cells(0.9), 1.0).startswith("None")


def test_controls_alone_are_all_there_is_to_say() -> None:
    """A plan may name matched:cam without cam."""
    controls = [replace(cell, region="matched:cam") for cell in cells(0.4)]
    assert strongest_attack_sentence(controls, 1.0) == (
        "Under pgd confined to matched:cam (0% of the image), 40% [30%, 50%] of 9 images remain correctly "
        "classified (100% without an attack)."
    )
    whole = replace(cells(0.2)[0], region="none")
    assert "matched:cam" not in strongest_attack_sentence([*controls, whole], 1.0)


def ends(images: int, fooled: int, **changes: Any) -> Extremes:
    rows = pd.DataFrame()
    return Extremes(rows, rows, images, fooled, **{"by_size": False, **changes})


def test_only_what_was_fooled_or_withstood_is_said_to_have_been() -> None:
    """No picture stands under "withstood" if nothing did, none under "fooled" if nothing was."""
    picture = Thumbnail("a.png", "", (), False)
    titles = {
        fooled: [title for title, _ in image_section(ends(4, fooled), [picture], [picture]).galleries]
        for fooled in (0, 2, 4)
    }
    assert titles == {
        0: ["Closest to being fooled", "Withstood longest"],
        2: ["Fooled most easily", "Withstood longest"],
        4: ["Fooled most easily", "Fooled last"],
    }
    for fooled in (0, 4):
        assert "never fooled" not in " ".join(image_sentences(ends(4, fooled)))
    assert "rank as the hardest" in image_sentences(ends(4, 2))[1]
    assert "2 withstood every attack, not counting fmn." in image_sentences(ends(4, 2, left_out=("fmn",)))[0]
    assert "withstood every attack whose outcome is known" in image_sentences(ends(4, 2, unknown=1))[0]


def test_the_most_frequent_confusion_is_only_one_if_no_other_is_as_frequent() -> None:
    classes = pd.DataFrame({"label": [0, 1], "name": ["cat", "dog"], "images": 9, "clean": 1.0})
    per = classes.assign(attack="pgd", region="none", robust=0.4, low=0.1, high=0.8)
    cases = (
        ((3, 3), (3, 3), "One of the most frequent"),
        ((3, 2), (3, 2), "The most frequent"),
        ((3, 2), (6, 2), "One of the most frequent"),  # three others of the first label may be of one class
        ((1, 1), (1, 1), "No"),
    )
    for counts, totals, start in cases:
        into = pd.DataFrame(
            {"label": [0, 1], "adversarial_class": ["dog", "cat"], "fooled": counts, "of": totals}
        )
        even, frequent = class_sentences(Classes(classes, per, into, CONFUSIONS))
        assert frequent.startswith(f"{start} confusion")
        assert (
            even
            == "Under pgd on the whole image, 40% of the images of every class remain correctly classified."
        )


@pytest.mark.parametrize(("images", "verb"), [(1, "remains"), (2, "remain")])
def test_one_image_of_a_class_remains_and_two_remain(images: int, verb: str) -> None:
    classes = pd.DataFrame({"label": [0, 1], "name": ["cat", "dog"], "images": [images, 9], "clean": 1.0})
    per = classes.assign(attack="pgd", region="none", robust=[0.1, 0.9], low=[0.0, 0.8], high=[0.2, 1.0])
    into = pd.DataFrame({"label": [0], "adversarial_class": ["dog"], "fooled": [1], "of": [1]})
    sentence = class_sentences(Classes(classes, per, into, CONFUSIONS))[0]
    assert (
        f"of {images} image{'s' if images > 1 else ''} of cat {verb} correctly classified, and " in sentence
    )


def depths(held: float) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "measure": "spread", "attack": "pgd", "region": "cam", "outcome": outcome, "place": 1, "layer": "conv",
                "mean": mean, "low": mean - 0.05, "high": mean + 0.05, "images": 20,
            }
            for outcome, mean in (("fooled", 0.5), ("withstood", held), ("random edit", 0.1))
        ]
    )  # fmt: skip


@pytest.mark.parametrize(("held", "compared"), [(0.1, True), (0.48, False)])
def test_layer_sentences_compare_with_the_control(held: float, compared: bool) -> None:
    (sentence,) = layer_section(depths(held)).sentences
    assert ("The intervals overlap" in sentence) is not compared
    assert ("does not explain success" in sentence) is not compared
    assert ("reach further than those of failed attacks" in sentence) is compared
    only = layer_section(depths(held).query("outcome == 'fooled'"))
    assert "no control to compare with" in only.sentences[0]


def many_classes(count: int) -> Section:
    classes = pd.DataFrame(
        {"label": range(count), "name": [f"</script>{n}" for n in range(count)], "images": 5, "clean": 1.0}
    )
    per = classes.assign(attack="pgd", region="none", robust=0.4, low=0.1, high=0.8)[
        ["label", "attack", "region", "images", "robust", "low", "high"]
    ]
    adversarial = pd.DataFrame(
        {"label": [0], "adversarial_class": ["</script><script>x"], "fooled": [3], "of": [4]}
    )
    return class_section(Classes(classes, per, adversarial, CONFUSIONS))


def test_the_strongest_attack_is_chosen_over_images_not_classes() -> None:
    """Ninety images of one class weigh as much as they are, however many small classes there are."""
    labels = ["large", "small", "tiny"]
    classes = pd.DataFrame({"label": range(3), "name": labels, "images": (90, 5, 5), "clean": 1.0})
    rows = [
        (label, "pgd", region, images, robust, max(0.0, robust - 0.1), min(1.0, robust + 0.1))
        for region, shares in (("cam", (0.1, 1.0, 1.0)), ("border", (0.9, 0.0, 0.0)))
        for label, (images, robust) in enumerate(zip((90, 5, 5), shares, strict=True))
    ]
    per = pd.DataFrame(rows, columns=["label", "attack", "region", "images", "robust", "low", "high"])
    none = pd.DataFrame(columns=["label", "adversarial_class", "fooled", "of"])
    # Under cam 19 of 100 images remain, under border 81; the means over classes are .70 and .30.
    (message, *_) = class_sentences(Classes(classes, per, none, CONFUSIONS))
    assert message.startswith("Under pgd confined to cam, 10% [")
    assert "] of 90 images of large remain correctly classified" in message


def test_layer_curves_of_few_images_have_no_interval() -> None:
    few = depths(0.1).assign(images=4, low=np.nan, high=np.nan)
    section = layer_section(few)
    text = page(section)
    assert "nan" not in " ".join(section.sentences).lower()
    assert "need 20 images" in text
    cells_ = [cell for table in section.tables for row in table.rows for cell in row]
    assert not [cell for cell in cells_ if "nan" in str(cell).lower()]


def test_a_thousand_classes_are_in_the_page_and_two_hundred_in_its_html() -> None:
    section = many_classes(1000)
    text = page(section)
    assert len(section.tables[0].rows) == 1000
    assert text.count("<tr>") == SHOWN + 1
    assert f"{SHOWN} of 1000 rows are shown" in text
    # As many script elements as a page with one class, and each of them closes: no name opens or closes one.
    assert text.count("<script") == text.count("</script") == page(many_classes(1)).count("<script")
    assert "<script>x" not in text
    assert not section.charts
    assert len(text) < 400_000


def test_colors_of_a_chart_are_those_of_the_page() -> None:
    spec = str(robust_section(cells(0.2, 0.9), 1.0).charts[0].spec)
    assert "var(--series-0)" in spec
    assert "#" not in spec
    assert "http" not in spec + str(CONFIG)


def test_a_curve_that_begins_later_has_its_own_size() -> None:
    later = curves(images=3)
    later.loc[later["control"] & (later["size"] == 0.04), "fooled"] = 0.8
    section = budget_section(later[~(later["control"] & (later["size"] < 0.04))], NONE)
    assert section.sentences[0].endswith(": confined to cam, 5.1/255; confined to matched:cam, 10/255.")


def test_every_chart_compiles() -> None:
    """Vega's own compiler accepts each kind of specification without a warning."""
    bins = pd.DataFrame(
        [
            ("pgd", "cam", outcome, low, low + 1.0, 3)
            for outcome in ("fooled", "withstood")
            for low in (-1.0, 0.0)
        ],
        columns=["attack", "region", "outcome", "low", "high", "count"],
    )
    confusions = pd.DataFrame(
        {"label": ["cat", "dog"], "adversarial_class": ["dog", "cat"], "fooled": [1, 2]}
    )
    charts = [
        robust_chart(pd.DataFrame([asdict(cell) for cell in cells(0.2, 0.9)]), 0.95),
        histogram_chart("margin", bins, {("pgd", "cam"): "pgd · cam"}),
        confusion_chart("pgd", confusions),
        budget_chart("pgd", curves()),
        layer_chart("spread", "", depths(0.1), 0.6),
    ]
    for chart in charts:
        spec = json.dumps({"config": CONFIG, **chart.spec, "width": 400})
        compiled = vl_convert.vegalite_to_vega(spec)
        assert compiled["marks"], chart
        # Every field that the chart draws is a column of its data.
        drawn = set(re.findall(r'"field": "(\w+)"', json.dumps(chart.spec)))
        rows: Any = chart.spec["datasets"]
        assert drawn <= {key for data in rows.values() for row in data for key in row}, chart


def test_a_caption_names_only_what_is_drawn() -> None:
    both, plain = (budget_chart("pgd", rows).meaning for rows in (curves(), curves().query("not control")))
    assert "are dashed" in both
    assert "dashed" not in plain
    with_clean, without = (robust_section(cells(0.5), clean).charts[0].meaning for clean in (0.9, nan))
    assert "dashed line" in with_clean
    assert "dashed" not in without


def test_ticks_of_layers_are_whole_and_different() -> None:
    for count in (1, 2, 3, 40):
        rows = pd.concat([depths(0.1).assign(place=place) for place in range(1, count + 1)])
        spec: Any = layer_chart("spread", "spread", rows, 0.5).spec
        ticks = spec["layer"][0]["encoding"]["x"]["axis"]["values"]
        assert ticks == sorted(set(ticks))
        assert set(ticks) <= set(range(1, count + 1))
        assert len(ticks) <= 10


def test_histograms_share_an_axis_and_the_regions_of_an_attack_share_heights() -> None:
    """An attack that ends in one bar does not flatten another; a bar of one attack means the same in each region."""
    shares = {("pgd", "none"): (4, 4, 2), ("pgd", "cam"): (2, 2, 6), ("fmn", "none"): (0, 10, 0)}
    bins = pd.DataFrame(
        [
            (attack, region, "fooled", low, low + 1, count)
            for (attack, region), counts in shares.items()
            for low, count in enumerate(counts)
            if count
        ],
        columns=["attack", "region", "outcome", "low", "high", "count"],
    )
    spec: Any = histogram_chart("margin", bins, dict.fromkeys(shares, "")).spec
    rows = spec["datasets"]["rows"]
    per = {(round(row["head"] - row["foot"], 3), row["fraction"]) for row in rows}
    heights = {fraction: height for height, fraction in per if fraction < 1}
    assert max(height for height, _ in per) == max(heights.values()) == 0.58  # both attacks fill their rows
    for fraction, height in heights.items():
        assert height == pytest.approx(0.58 * fraction / 0.6, abs=2e-3)
