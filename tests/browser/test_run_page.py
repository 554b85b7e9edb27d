"""A run's report in a real browser: every chart is drawn, tables answer, nobody is asked for anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.audit.fixtures import NETWORKS, draw_pictures, small_plan
from tests.browser.test_explanation_page import Opened, check_injections_are_blocked
from weakspot.audit import Run, audit, write_run_report
from weakspot.audit.findings.contrasts import Contrast
from weakspot.audit.findings.curves import BUDGET_COLUMNS
from weakspot.audit.page.elements import Section, Table, count_cell, text_cell
from weakspot.audit.page.outcome_sections import budget_section
from weakspot.audit.page.run_page import Header, Queries, run_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
UNFOLD = "for (const fold of document.querySelectorAll('details')) fold.open = true"
MARKS = "svg .mark-rect path, svg .mark-symbol path, svg .mark-line path, svg .mark-rule line, svg .mark-area path"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("reported")
    (folder / "audited_networks.py").write_text(NETWORKS)
    draw_pictures(folder / "pictures", 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        made: Run = audit(
            small_plan(folder / "pictures", analyses=("overlap", "propagation"), labels="predictions"),
            folder / "run",
        )
        yield write_run_report(made, folder / "report.html")
        sys.modules.pop("audited_networks", None)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_every_chart_is_drawn_in_the_colors_of_the_page(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, report, width, scheme)
    for select in opened.page.query_selector_all(".which"):
        for option in select.query_selector_all("option"):
            select.select_option(label=option.inner_text())
            opened.page.wait_for_function(
                "() => [...document.querySelectorAll('.drawn:not([hidden]) .chart')]"
                ".every((chart) => chart.dataset.drawn === 'yes')"
            )
            for chart in opened.page.query_selector_all(".drawn:not([hidden]) .chart"):
                assert chart.query_selector_all(MARKS)
                box, space = chart.query_selector("svg").bounding_box(), chart.bounding_box()
                assert 100 < box["width"] <= space["width"] + 1
    assert len(opened.page.query_selector_all(".chart svg")) == len(opened.page.query_selector_all(".chart"))
    ink = opened.page.evaluate(
        "getComputedStyle(document.querySelector('.chart svg .role-axis-label text')).fill"
    )
    assert ink == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 237)")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.wrong == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]


def test_only_the_scripts_and_styles_of_the_page_run(browser: Any, report: Path, tmp_path: Path) -> None:
    check_injections_are_blocked(browser, report, tmp_path)


def test_a_tooltip_floats_over_its_chart(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.hover(".drawn:not([hidden]) .chart svg .mark-rect path >> nth=0")
    opened.page.wait_for_selector("#vg-tooltip-element.visible")
    position = "getComputedStyle(document.getElementById('vg-tooltip-element')).position"
    assert opened.page.evaluate(position) == "fixed"
    assert opened.wrong == []


def test_tables_are_sorted_and_filtered(browser: Any, report: Path) -> None:
    page = Opened(browser, report).page

    def column(number: int) -> list[float]:
        cells = page.query_selector_all(f"#table-robust tbody tr > :nth-child({number})")
        return [float(cell.get_attribute("data-order") or "nan") for cell in cells]

    page.evaluate(UNFOLD)
    page.click("#table-robust th:nth-child(6) button")
    assert column(6) == sorted(column(6))
    page.click("#table-robust th:nth-child(6) button")
    assert column(6) == sorted(column(6), reverse=True)
    page.fill(".filter[data-table=distributions]", "ssim")
    rows = page.query_selector_all("#table-distributions tbody tr")
    assert len(rows) == 4
    assert all("SSIM" in row.inner_text() for row in rows)


def test_printing_unfolds_everything_and_folds_it_again(browser: Any, report: Path) -> None:
    page = Opened(browser, report).page
    opened = "[...document.querySelectorAll('details')].map((fold) => fold.open)"
    page.evaluate("document.querySelector('details').open = true")
    before = page.evaluate(opened)
    assert before.count(True) == 1
    assert before.count(False) > 3
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert all(page.evaluate(opened))
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(opened) == before


def test_curves_over_sizes_are_drawn(browser: Any, tmp_path: Path) -> None:
    rows = [
        ("<b>pgd</b>", region, control, norm, size, 10 * size, 5 * size, 12 * size, 9)
        for region, control in (("cam", False), ("</script>", True))
        for norm in ("linf", "l2")
        for size in (0.01, 0.05)
    ]
    section = budget_section(
        pd.DataFrame(rows, columns=list(BUDGET_COLUMNS)), pd.DataFrame(columns=list(Contrast._fields))
    )
    path = tmp_path / "page.html"
    path.write_text(run_page(Header("t", "", "", [], []), [section], {}, Queries("", "")), "utf-8")
    opened = Opened(browser, path)
    assert len(opened.page.query_selector_all(".chart svg .mark-line path")) == 2
    assert "</script>" in (opened.page.text_content(".chart svg") or "")
    assert opened.wrong == []


def test_hidden_rows_appear_when_filtered_or_sorted(browser: Any, tmp_path: Path) -> None:
    rows = [[text_cell(f"class {number:03d}"), count_cell(number)] for number in range(300)]
    page = run_page(
        Header("t", "", "", [], []),
        [Section("s", "s", ["said"], tables=[Table("many", ("name", "n"), rows)])],
        {},
        Queries("", ""),
    )
    path = tmp_path / "page.html"
    path.write_text(page, "utf-8")
    opened = Opened(browser, path)
    names = "#table-many tbody tr th"
    assert len(opened.page.query_selector_all(names)) == 200
    opened.page.evaluate(UNFOLD)
    opened.page.fill(".filter", "class 29")
    assert [row.inner_text() for row in opened.page.query_selector_all(names)] == [
        f"class 29{n}" for n in range(10)
    ]
    opened.page.fill(".filter", "")
    for _ in range(2):
        opened.page.click("#table-many th:nth-child(2) button")
    assert opened.page.inner_text(names) == "class 299"
    assert opened.wrong == []
