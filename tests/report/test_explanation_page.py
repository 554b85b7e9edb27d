"""The explanation page: one file, nothing from outside, every number equal to the explanation's."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from markupsafe import escape
from PIL import Image

from tests.networks import NETWORKS
from weakspot import Classifier, Explanation, Linf, explain
from weakspot.attacks import pgd
from weakspot.explanations.analysis import Picture
from weakspot.report.explanation_page import _failure, notebook_frame, page
from weakspot.report.glossary import TERMS, WORDS
from weakspot.report.image_findings import QUESTIONS
from weakspot.report.map_views import MapView, map_views, worth_drawing

NAN = float("nan")
HOSTILE = [
    "<img src=x onerror=\"document.title='broken'\">",
    "</script><script>document.title='broken'</script>",
]


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    module, images = NETWORKS["pooling"]()
    model = Classifier.wrap(module, class_names=[HOSTILE[0], "b & b", "{target}", "d"])
    labels = model(images).argmax(1)
    pairs = pgd(model, images, labels, budget=Linf(0.2), steps=4)
    return explain(
        model, pairs, names=[HOSTILE[1], "second", "third"], made={"attack": HOSTILE[1], "seed": "0"}
    )


class Reader(HTMLParser):
    """Collects tags and the JSON that the page carries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.documents: list[Any] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.documents.append(json.loads(data))
            self.inside = False


def test_nothing_is_fetched_from_anywhere(explanation: Explanation) -> None:
    text = page(explanation)
    for tag, attributes in Reader(text).tags:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(
                ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
            ), (tag, name, value[:80])
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text)
    assert "default-src 'none'" in text


def test_names_from_outside_are_escaped(explanation: Explanation) -> None:
    read = Reader(page(explanation))
    assert not [attributes for tag, attributes in read.tags if "onerror" in attributes]
    scripts = [attributes for tag, attributes in read.tags if tag == "script"]
    assert len(scripts) == len(explanation) + 2  # each pair's data, the shared tables, the page's own
    assert html.escape("</script><script>", quote=False) in page(explanation)


def test_maps_in_the_page_are_those_of_the_explanation(explanation: Explanation) -> None:
    documents = [document for document in Reader(page(explanation)).documents if "maps" in document]
    assert len(documents) == len(explanation)
    for index, document in enumerate(documents):
        drawn, remarks = worth_drawing(map_views(explanation, index))
        assert set(document["maps"]) == {view.name for view in drawn}
        assert set(document["maps"]) | set(remarks) == {"difference", *explanation.maps} - {"smallest_square"}
        for name, packed in document["maps"].items():
            maps = (
                explanation.pairs.perturbation.mean(1)
                if name == "difference"
                else explanation.maps[name][:, 0]
            )
            wanted = maps[index].double().numpy()
            levels = np.frombuffer(zlib.decompress(base64.b64decode(packed["values"])), np.uint8)
            low, high = packed["range"]
            values = low + levels.reshape(document["height"], document["width"]) / 255 * (high - low)
            np.testing.assert_allclose(values, wanted, atol=(high - low) / 255)


def test_pictures_in_the_page_are_the_images_to_eight_bits(explanation: Explanation) -> None:
    document = next(document for document in Reader(page(explanation)).documents if "maps" in document)
    for name in ("clean", "adversarial"):
        picture = Image.open(io.BytesIO(base64.b64decode(document[name].split(",")[1])))
        image = getattr(explanation.pairs, name)[0]
        np.testing.assert_array_equal(
            np.asarray(picture), (image * 255).round().byte().permute(1, 2, 0).numpy()
        )


def test_class_activations_of_a_pair_share_one_scale(explanation: Explanation) -> None:
    for index, document in enumerate(
        document for document in Reader(page(explanation)).documents if "maps" in document
    ):
        limits = {
            tuple(packed["limits"]) for name, packed in document["maps"].items() if name.startswith("cam_")
        }
        assert len(limits) <= 1
        highest = max(
            float(explanation.maps[name][index].max()) for name in explanation.maps if name.startswith("cam_")
        )
        assert not limits or limits.pop() == pytest.approx((0, highest if highest > 0 else 1))


def test_class_names_with_braces_stay_as_they_are(explanation: Explanation) -> None:
    """A class called "{target}" must not be filled in twice."""
    for index in range(len(explanation)):
        own, other = explanation.class_names[index]
        titles = {view.name: view.title for view in map_views(explanation, index)}
        assert titles["cam_label_clean"] == f"{own}, clean image"
        assert titles["cam_target_clean"] == f"{other}, clean image"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "not found"),
        ({"asked_for_target": True}, "not the target"),
        ({"asked_for_target": True, "read_clean_as": "b"}, "misclassified without an attack"),
        ({"success": True}, "fools only before rounding to 8 bits"),
        ({"success": True, "success_8bit": True}, ""),
    ],
)
def test_an_attack_that_did_not_succeed_is_named_as_what_it_is(
    changed: dict[str, object], words: str
) -> None:
    row = {
        "read_clean_as": "a",
        "label": "a",
        "success": False,
        "success_8bit": False,
        "asked_for_target": False,
    }
    assert _failure(pd.Series({**row, **changed})) == words


def test_a_difference_over_the_whole_range_is_not_amplified(explanation: Explanation) -> None:
    pairs = replace(explanation.pairs, adversarial=1 - explanation.pairs.clean.round())
    pairs = replace(pairs, clean=explanation.pairs.clean.round())
    views = map_views(replace(explanation, pairs=pairs), 0)
    assert views[0].title == "Difference"
    assert map_views(explanation, 0)[0].title.startswith("Difference, amplified ")


def test_the_page_of_four_photographs_is_under_five_megabytes_and_has_the_verdicts(
    tmp_path: Path,
) -> None:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([images[:, :, :112].mean((1, 2, 3)), images[:, :, 112:].mean((1, 2, 3))], 1)

    from weakspot import sample_images

    images, names = sample_images()
    pairs = pgd(Mean().eval(), images, torch.tensor([0, 1, 0, 1]), budget=Linf(8 / 255), steps=2)
    explanation = explain(Mean().eval(), pairs, names=names)
    path = explanation.to_html(tmp_path / "deep" / "report.html")
    assert path.stat().st_size < 5_000_000
    text = path.read_text("utf-8")
    for index, name in enumerate(names):
        assert name in text
        assert str(escape(explanation.verdict(index))) in text  # in the text for screen readers
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_notebook_shows_the_page_in_a_frame(explanation: Explanation) -> None:
    framed = notebook_frame(explanation)
    assert html.unescape(re.findall(r'srcdoc="(.*?)" style', framed, re.DOTALL)[0]) == page(explanation)
    assert explanation._repr_html_() == framed


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channel_counts_are_drawn(channels: int) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 3, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    images = torch.rand(1, channels, 12, 17)
    explanation = explain(network, pgd(network, images, network(images).argmax(1), steps=2))
    documents = [document for document in Reader(page(explanation)).documents if "maps" in document]
    assert (documents[0]["height"], documents[0]["width"]) == (12, 17)
    assert explanation.figure().axes


def test_a_pair_without_any_change_is_reported_and_not_explained(
    pooling: tuple[torch.nn.Module, torch.Tensor],
) -> None:
    from weakspot import Pairs

    model, images = pooling
    explanation = explain(model, Pairs.of(model, images, images))
    assert explanation.verdict(0) == "The two images are identical; there is nothing to explain."
    assert (
        "NaN" not in re.sub(r'"values": ".*?"|base64,[^"]*', "", page(explanation)).split("<script type=")[0]
    )


def test_a_figure_draws_both_images_and_every_map_that_shows_something(explanation: Explanation) -> None:
    sheet = explanation.figure(1)
    titles = [axis.get_title() for axis in sheet.axes if axis.get_title()]
    assert titles[:2] == ["clean", "adversarial"]
    views, _ = worth_drawing(map_views(explanation, 1))
    assert len(titles) == 2 + len(views)
    assert len([axis for axis in sheet.axes if axis.images]) >= 2 + len(views)
    with pytest.raises(IndexError, match=r"index must be from -3 to 2, got 3"):
        explanation.figure(3)


def test_a_classifier_without_class_names_gets_numbers(pooling: tuple[torch.nn.Module, torch.Tensor]) -> None:
    model, images = pooling
    explanation = explain(Classifier.wrap(model), pgd(model, images, model(images).argmax(1), steps=1))
    assert explanation.scores["label"].str.fullmatch(r"class \d").all()


def shown_scores(explanation: Explanation) -> list[str]:
    """Rows of the table of scores, of all pairs, as text."""
    main = page(explanation).split("<main>")[1]
    rows = re.findall(
        r"<tr><th scope=\"row\".*?</tr>", re.sub(r"<script.*?</script>", "", main, flags=re.DOTALL)
    )
    return [re.sub(r"<[^>]+>", "|", row) for row in rows]


@pytest.mark.parametrize("analysis", ["overlap", "promotion"])
def test_scores_are_compared_with_other_images_if_there_are_any(
    pooling: tuple[torch.nn.Module, torch.Tensor], analysis: str
) -> None:
    model, images = pooling
    pairs = pgd(model, images, model(images).argmax(1), budget=Linf(0.2), steps=4)
    others = torch.rand(20, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    name = {"overlap": "effect in roi", "promotion": "interpretability label"}[analysis]
    headings = (">other images<", ">p<", ">q<")
    for reference in (others, None):
        compared = explain(model, pairs, analyses=[analysis], reference=reference)
        text = page(compared).split("<main>")[1].split("</main>")[0]
        assert all((heading in text) == (reference is not None) for heading in headings)
        rows = [row for row in shown_scores(compared) if f"|{name}|" in row]
        assert len(rows) == 3
        assert all(
            ("(p " in row) == (reference is not None) for row in rows
        )  # p by shifts never stands alone


def test_where_a_confined_attack_acts_is_not_shown(pooling: tuple[torch.nn.Module, torch.Tensor]) -> None:
    model, images = pooling
    region = torch.zeros(3, 1, 20, 20, dtype=torch.bool)
    region[..., 4:9, 4:9] = True
    pairs = pgd(model, images, model(images).argmax(1), budget=Linf(0.2), region=region, steps=4)
    rows = shown_scores(explain(model, pairs, analyses=["overlap", "promotion"]))
    for name in ("effect in roi", "jaccard", "spearman", "moran i", "relation", "interpretability label"):
        ours = [row for row in rows if f"|{name}|" in row]
        assert len(ours) == 3
        assert all("|not compared|" in row for row in ours), name


def test_every_link_leads_to_a_place_in_the_page_and_every_score_to_its_meaning(
    explanation: Explanation,
) -> None:
    tags = Reader(page(explanation)).tags
    places = [attributes["id"] for _, attributes in tags if attributes.get("id")]
    assert len(places) == len(set(places))
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert {f"#{place}" for place in places} >= links
    assert {f"#about-score-{name}" for name in ("effect-in-roi", "effect_in_roi")} & links
    assert set(WORDS.values()) <= set(TERMS)


def test_all_but_verdict_and_pictures_is_folded_by_question(explanation: Explanation) -> None:
    text = page(explanation)
    assert not re.search(r"<details[^>]* open", text)
    titles = re.findall(r"<summary><strong>(.*?)</strong>", text)
    assert titles[:5] == [*QUESTIONS, "Scores"]
    assert titles[-2:] == ["Glossary", "How this was made"]
    assert text.index("What to do next") > text.rindex("</article>")
    unfolded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert len(re.findall(r"<canvas", unfolded)) <= 4 * len(explanation)


def test_an_attack_that_failed_has_no_fact_and_says_how_much_of_the_margin_it_took() -> None:
    module, images = NETWORKS["pooling"]()
    model = Classifier.wrap(module)
    pairs = pgd(model, images, model(images).argmax(1), budget=Linf(1e-5), steps=1)
    text = page(explain(model, pairs, analyses=["cam"]))
    assert text.count("The attack found no adversarial example") >= len(images)
    assert text.count("of the margin of") + text.count("margin</a> of") >= len(images)
    assert 'class="fact"' not in text
    assert "does not mean that none exists" in text


def view(
    name: str, values: list[float], kind: str = "magnitude", high: float = 1.0, scale: str = ""
) -> MapView:
    picture = Picture(name, kind=kind, categories=("none", "both"), scale=scale or None)
    low = -high if kind == "signed" else 0.0
    return MapView(name, name, "", picture, np.array([values], np.float32), low, high)


REPEATED = "“b” is not drawn: its pattern is nearly that of “a”."


@pytest.mark.parametrize(
    ("maps", "wanted"),
    [
        ([view("a", [0.5, 0.51, 0.52])], ["“a” is between 0.5 and 0.52 everywhere."]),
        ([view("a", [0.5, 0.5, 0.5])], ["“a” is 0.5 everywhere."]),
        ([view("a", [-3.0, -2.0, -0.1])], ["“a” is nowhere above 0."]),
        ([view("a", [NAN, NAN, NAN])], ["“a” is not defined for this image."]),
        ([view("a", [1, 1, 1], "category")], ["“a” is the same everywhere: both."]),
        ([view("a", [0, 0, 1], "category")], []),
        # One place that differs is what a map is for.
        ([view("a", [0.5, 0.5, 0.5, 0.9])], []),
        ([view("a", [0.5, 0.5, NAN])], []),
        ([view("a", [0, 0.4, 1]), view("b", [0, 0.41, 1])], [REPEATED]),
        # On scales of their own, the same pattern; on one scale, half as much is something else.
        ([view("a", [0, 0.4, 1]), view("b", [0, 4, 10], high=10)], [REPEATED]),
        ([view("a", [0, 0.4, 1], scale="s"), view("b", [0, 0.2, 0.5], scale="s")], []),
        ([view("a", [0, 0.4, 1]), view("b", [0, 0.4, 1], "signed")], []),
        ([view("difference", [0, 0, 0], "signed")], []),
    ],
)  # fmt: skip
def test_maps_that_show_nothing_new_become_sentences(maps: list[MapView], wanted: list[str]) -> None:
    drawn, sentences = worth_drawing(maps)
    assert list(sentences.values()) == wanted
    assert len(drawn) + len(sentences) == len(maps)
