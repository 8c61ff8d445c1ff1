"""Pictures of the demo for its documentation, and to be looked at: every tab, on a desk and on a phone.

    gcpo-t2i demo --runs_dir runs --port 7860            # in another terminal
    python -m tests.screenshots http://127.0.0.1:7860 docs/images

Writes demo-generate.png, demo-explain.png, demo-training.png, demo-compare.png, demo-reasoning.png, and the same with -phone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.browser import chromium

SIZES = {"": {"width": 1280, "height": 800}, "-phone": {"width": 390, "height": 844}}
PATIENCE = 300_000  # ms


def open_tab(page: Any, name: str) -> None:
    """Gradio puts tabs that do not fit behind a button of three dots."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").first.click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()


def generate(page: Any) -> None:
    page.locator("#generate-go").click()
    page.locator("#generate-cells .map").first.wait_for(timeout=PATIENCE)
    point_at(page, "#generate-cells .map >> nth=1")


def explain(page: Any) -> None:
    open_tab(page, "Explain an image")
    page.locator("#explain-scene").click()
    page.locator("#explain-picture img").first.wait_for(timeout=PATIENCE)
    page.locator("#explain-go").click()
    page.locator("#explain-cells .map").first.wait_for(timeout=PATIENCE)
    point_at(page, "#explain-cells .map >> nth=2")


def training(page: Any) -> None:
    open_tab(page, "Training run")
    choose(page, "#training-run", None)
    page.locator("#training-plot-0 svg .mark-line path").first.wait_for(timeout=PATIENCE)


def compare(page: Any) -> None:
    open_tab(page, "Compare")
    choose(page, "#compare-run", None)
    page.locator("#compare-go").click()
    page.locator("#compare-after img").first.wait_for(timeout=PATIENCE)


def reasoning(page: Any) -> None:
    open_tab(page, "Reasoning")
    page.locator("#reasoning-go").click()
    page.locator("#reasoning-answers span").first.wait_for(timeout=PATIENCE)


def choose(page: Any, dropdown: str, name: str | None) -> None:
    """An option of a list, by default the first."""
    page.locator(f"{dropdown} input").click()
    options = page.get_by_role("option")
    (options.first if name is None else options.filter(has_text=name).first).click()


def point_at(page: Any, selector: str) -> None:
    target = page.locator(selector)
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4)


TABS = {"generate": generate, "explain": explain, "training": training, "compare": compare, "reasoning": reasoning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tabs", nargs="+", choices=TABS, default=list(TABS))
    parser.add_argument("--sizes", nargs="+", choices=("desk", "phone"), default=["desk", "phone"])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for suffix, size in SIZES.items():
            if ("phone" if suffix else "desk") not in given.sizes:
                continue
            for name in given.tabs:
                page = browser.new_page(viewport=size, device_scale_factor=1)
                page.goto(given.url)
                page.get_by_role("tab").first.wait_for(timeout=PATIENCE)
                TABS[name](page)
                page.wait_for_timeout(1000)
                page.evaluate("window.scrollTo(0, 0)")
                page.screenshot(path=given.folder / f"demo-{name}{suffix}.png", full_page=True)
                page.close()


if __name__ == "__main__":
    main()
