"""The explorer against its goals: first paint, probes, Stop, bytes, requests, masks, logits; filters and pictures.

Run: python -m benchmarks.explorer [--json FILE]. It needs Chromium.

Starts `weakspot explore --samples` (EfficientNet-Lite0 at 224) as a person would, opens it in a headless browser, and
measures what the person sees: from a pointer's move to the logits beside the cursor, from a click on Stop to the
result. The gallery of 100,000 records is measured last, without a browser (benchmarks/gallery.py).
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import gallery
from benchmarks.records import recorded
from weakspot import load, sample_images
from weakspot.report.rendering import drawing_modules

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OPENED, PROBES, STOPS, MASKS, CHECKED = 8, 60, 10, 5, 20  # how often each is measured
WAIT = 120_000  # milliseconds
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
# The page itself waits, by a promise: asking it again and again would take time from the network on the same cores.
# Notes the time of each move of the pointer, and of each change of the tip beside the cursor.
WATCH_PROBES = """() => {
  const canvas = document.querySelector('canvas.picture');
  canvas.addEventListener('pointermove', () => { window.moved = performance.now(); }, true);
  const seen = new MutationObserver(() => { window.shown = performance.now(); window.told?.(); });
  seen.observe(document.querySelector('.tip'), { childList: true, subtree: true });
}"""
# Notes the time of each click on the button of the attack, and of the sentence about an attack that was stopped.
WATCH_STOPS = """() => {
  const button = document.querySelector('button.primary'), sentence = document.querySelector('.attack .sentence');
  button.addEventListener('click', () => { window.clicked = performance.now(); }, true);
  const seen = new MutationObserver(() => {
    if (sentence.textContent.startsWith('Stopped')) { window.ended = performance.now(); window.told?.(); }
  });
  seen.observe(sentence, { childList: true, characterData: true, subtree: true });
}"""


@contextmanager
def explorer() -> Iterator[tuple[str, int]]:
    """The address of a running `weakspot explore --samples`, and its process number."""
    command = [sys.executable, "-m", "weakspot", "explore", "--samples", "--no-browser", "--port", "8790"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A run in the background ignores interrupts, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    try:
        for line in process.stdout or ():
            found = re.search(r"http://\S+token=\S+", line)
            if found:
                yield found[0], process.pid
                break
        else:
            raise SystemExit("weakspot explore did not print its address")
    finally:
        begun = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.wait(20)
        print(f"\nCtrl-C ended the program in {time.perf_counter() - begun:.1f} s.")


def opened(browser: Browser, url: str, asked: list[str]) -> Page:
    """The page, when the picture is on it."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(url)
    page.wait_for_selector("#bench[data-ready=yes]", timeout=WAIT)
    return page


def first_paints(browser: Browser, url: str, asked: list[str]) -> tuple[list[float], list[float]]:
    """Milliseconds from navigation to the first paint, and to the picture with its classes, of fresh visits."""
    paints, pictures = [], []
    for _ in range(OPENED):
        page = opened(browser, url, asked)
        entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        paints.append(float(page.evaluate(entry)))
        pictures.append(float(page.evaluate("Number(document.querySelector('#bench').dataset.shown)")))
        page.wait_for_timeout(
            3000
        )  # the network is recorded for probes meanwhile, and the next visitor finds it at rest
        page.context.close()
    return paints, pictures


def probe_times(page: Page, *, heat: bool, still: float = 0) -> list[float]:
    """Milliseconds from the pointer's move to new logits beside it, at places drawn at random.

    Args:
        page: with the bench.
        heat: whether the heat map fills in meanwhile.
        still: milliseconds that the pointer rests before each move; 0 for a pointer that goes on at once.
    """
    page.evaluate(WATCH_PROBES)
    toggle = page.get_by_label("heat map")
    toggle.set_checked(False)  # what an earlier measurement has filled in is forgotten
    toggle.set_checked(heat)
    left, top, width, height = page.eval_on_selector(
        "canvas.picture",
        "c => { const b = c.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }",
    )
    rng = np.random.default_rng(0)
    times = []
    for across, down in rng.uniform(0.02, 0.98, (PROBES + 5, 2)):
        page.wait_for_timeout(still)
        page.evaluate("() => { window.shown = 0; }")
        page.mouse.move(left + across * width, top + down * height)
        page.evaluate("() => window.shown || new Promise((told) => { window.told = told; })")
        times.append(float(page.evaluate("window.shown - window.moved")))
    return times[5:]


def stop_times(page: Page, process: int) -> tuple[list[float], float]:
    """Milliseconds from a click on Stop to the sentence about the best so far, of attacks with 1000 steps.

    Also the megabytes that the program holds after the last one beyond those after the second one.
    """
    page.get_by_label("Mask from", exact=True).select_option("cam")
    page.locator(".area", has_text="pixels").wait_for(timeout=WAIT)
    page.click("summary:text-is('Settings of the attack')")
    page.fill("label:has-text('Steps') input", "1000")
    page.evaluate(WATCH_STOPS)
    rng = np.random.default_rng(0)
    times, memory = [], []
    for _ in range(STOPS):
        page.evaluate("() => { window.ended = 0; }")
        page.click("button.primary")
        page.locator("figure.side.attack .says", has_text="step").wait_for(timeout=WAIT)
        page.wait_for_timeout(float(rng.uniform(300, 1500)))
        page.click("button.primary")
        page.evaluate("() => window.ended || new Promise((told) => { window.told = told; })")
        times.append(float(page.evaluate("window.ended - window.clicked")))
        page.locator("button.primary", has_text="Attack").wait_for(timeout=WAIT)
        memory.append(resident(process))
    return times, memory[-1] - memory[1]


def logit_errors(page: Page) -> list[float]:
    """Largest difference of the logits of a probe from a pass of the edited image, as a fraction of their range."""
    model, (images, _) = load("efficientnet_lite0", device="cpu"), sample_images()
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(CHECKED):
        size = int(rng.choice([1, 3, 9, 32]))
        top, left = rng.integers(0, 224 - size, 2)
        color = rng.integers(0, 256, 3).tolist()
        middle = {"y": int(top + size // 2), "x": int(left + size // 2)}
        body = {"image": 0, **middle, "size": size, "color": color, "page": "check"}
        reply = page.evaluate(
            "body => fetch('api/probe', { method: 'POST', body: JSON.stringify(body) }).then((reply) => reply.json())",
            body,
        )
        edited = images[:1].clone()
        edited[0, :, top : top + size, left : left + size] = torch.tensor(color)[:, None, None] / 255
        with torch.no_grad():
            logits = model(edited)[0]
        told = {guess["index"]: guess["logit"] for guess in reply["top"]}
        spread = float(logits.max() - logits.min())
        errors.append(max(abs(value - float(logits[index])) for index, value in told.items()) / spread)
    return errors


def changed_masks(page: Page) -> int:
    """How many of some random masks come out of the page otherwise than they went in, or than they were painted."""
    rng = np.random.default_rng(2)
    changed = 0
    for density in rng.uniform(0.01, 0.99, MASKS):
        mask = rng.random((224, 224)) < density
        changed += not np.array_equal(_through_the_page(page, mask), mask)
    return changed


def _through_the_page(page: Page, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    given = {"name": "mask.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    page.set_input_files("input[aria-label='Open a mask file']", given)  # type: ignore[arg-type]
    page.locator(".area", has_text=f"{int(mask.sum()):,} pixels").wait_for(timeout=WAIT)
    with page.expect_download() as download:
        page.click("text=Save mask")
    with Image.open(Path(download.value.path())) as picture:
        return np.array(picture)


def page_bytes(asked: Sequence[str]) -> int:
    """Bytes of the page, its scripts and its styles, unpacked."""
    names = {urlsplit(url).path.rpartition("/")[2] for url in asked if "/static/" in url} | {"index.html"}
    folders = (files("weakspot.explorer").joinpath("static"), drawing_modules())
    return sum(
        len(folder.joinpath(name).read_bytes())
        for name in names
        for folder in folders
        if folder.joinpath(name).is_file()
    )


def resident(process: int) -> float:
    """Megabytes that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def cpu_seconds(process: int) -> float:
    """What a process has used of all cores."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def p95(values: Sequence[float]) -> float:
    """The 95th percentile, with the higher of two neighbors."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


@dataclass(frozen=True)
class Series:
    """Times of one thing that a person does.

    Attributes:
        what: from what to what.
        values: milliseconds.
        cpu: seconds of all cores that the program used for all of them.
        goal: milliseconds, below which 95% must be, or all of them.
        strict: whether all of them must be.
    """

    what: str
    values: Sequence[float]
    cpu: float
    goal: float
    strict: bool = False

    @property
    def row(self) -> str:
        """Of the table."""
        reached = max(self.values) if self.strict else p95(self.values)
        numbers = (statistics.median(self.values), p95(self.values), max(self.values))
        shown = " | ".join(f"{one:.0f} ms" for one in numbers)
        cpu = "" if math.isnan(self.cpu) else f"{1000 * self.cpu / len(self.values):.0f} ms"
        goal = f"{'all' if self.strict else '95%'} below {self.goal:.0f} ms"
        verdict = "met" if reached < self.goal else "missed"
        return f"| {self.what} | {len(self.values)} | {shown} | {cpu} | {goal} | {verdict} |"


def main() -> None:
    """Print the table."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("the explorer is measured in Chromium, which is not installed")
    asked: list[str] = []
    with explorer() as (url, process), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS.split())
        cpu = [cpu_seconds(process)]
        paints, pictures = first_paints(browser, url, asked)
        cpu.append(cpu_seconds(process))
        page = opened(browser, url, asked)
        plain = probe_times(page, heat=False)
        cpu.append(cpu_seconds(process))
        moving = probe_times(page, heat=True)
        resting = probe_times(page, heat=True, still=400)
        errors, masks = logit_errors(page), changed_masks(page)
        started = cpu_seconds(process)
        stops, more = stop_times(page, process)
        ended = cpu_seconds(process)
        browser.close()
    away = [one for one in asked if urlsplit(one).hostname not in {"127.0.0.1", None}]
    weight = page_bytes(asked)
    print("\n| from, to | n | median | 95% below | worst | CPU of the program, each | goal | |")
    print("|---|---|---|---|---|---|---|---|")
    for series in (
        Series("opening the link, first paint", paints, cpu[1] - cpu[0], 1000, strict=True),
        Series("opening the link, picture and classes", pictures, cpu[1] - cpu[0], 1000, strict=True),
        Series("pointer moves, logits beside it", plain, cpu[2] - cpu[1], 100),
        Series("the same with a heat map, which rests meanwhile", moving, float("nan"), 100),
        Series("pointer moves after 0.4 s, while the heat map fills", resting, float("nan"), 100),
        Series("click on Stop, result (CPU: of the whole attack)", stops, ended - started, 500),
    ):
        print(series.row)
    print("\n| | value | goal | |\n|---|---|---|---|")
    for what, value, goal, met in (
        ("page, unpacked", f"{weight / 1000:.0f} kB", "300 kB", weight < 300_000),
        (f"requests that left the host, of {len(asked)}", str(len(away)), "0", not away),
        (f"masks that came out changed, of {MASKS}", str(masks), "0", not masks),
        (
            f"largest error of {CHECKED} probes' logits, of their range",
            f"{max(errors):.1e}",
            "1e-4",
            max(errors) <= 1e-4,
        ),
        (f"memory after {STOPS} stopped attacks, less after 2", f"{more:+.0f} MB", "under 50 MB", more < 50),
    ):
        print(f"| {what} | {value} | {goal} | {'met' if met else 'missed'} |")
    gallery.main()
    jobs = os.getloadavg()[0]
    print(
        f"\nLoad of the machine at the end: {jobs:.1f}; over {os.cpu_count()}, other jobs ran beside this one."
    )


if __name__ == "__main__":
    with recorded(
        "explorer",
        "The explorer's bench in a browser and its gallery of 100,000 records, against their goals.",
    ):
        main()
