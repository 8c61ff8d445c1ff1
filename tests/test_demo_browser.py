"""The demo in a real browser: every tab is clicked through, and what the page shows is compared with the library."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.config import CotHeatmapConfig
from gcpo_t2i.cot.heatmap import DEFAULT_ANSWER
from gcpo_t2i.cot.models import EMBEDDED_MODEL
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE
from gcpo_t2i.demo import training
from gcpo_t2i.demo.page import build, serve
from gcpo_t2i.demo.reasoning import CONTRASTS, NORMALIZERS, Reasoner, drawn, order
from gcpo_t2i.demo.studio import Studio
from gcpo_t2i.demo.views import cells, table
from tests.browser import MISSING, chromium, find_browser
from tests.screenshots import choose, open_tab, reasoning
from tests.test_demo import ORDER, huge_png, runs_dir, studio, write_run

pytest.importorskip("playwright", reason="needs playwright: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(find_browser() is None, reason=MISSING)

__all__ = ["runs_dir", "studio"]  # fixtures

PATIENCE = 120_000  # ms


@pytest.fixture(scope="module")
def address(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setattr(training, "EVERY", 0.5)
        page = build(studio)
        yield serve(page, studio, block=False)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody new. Their pages must not have met an error of JavaScript in the end."""
    contexts, errors = [], []

    def arrive(**options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("tab", name="Generate").wait_for()
        return page

    yield arrive
    for context in contexts:
        context.close()
    assert not errors


def generate(page: Any, text: str = ORDER.text, negative: str = "", seed: int = ORDER.seed) -> None:
    if not page.locator("#generate-seed input").is_visible():
        page.get_by_role("button", name="Sampling").first.click()
    boxes = {
        "#generate-prompt textarea": text,
        "#generate-negative textarea": negative,
        "#generate-seed input": str(seed),
        "#generate-group input[type=number]": str(ORDER.group),
    }

    def filled() -> dict[str, str]:
        """What is in the boxes a moment later: a page that is still being built may put its own values back."""
        for box, value in boxes.items():
            if page.locator(box).input_value() != value:
                page.locator(box).fill(value)
                page.locator(box).blur()
        page.wait_for_timeout(300)
        return {box: page.locator(box).input_value() for box in boxes}

    until(page, filled, boxes.__eq__)
    page.locator("#generate-go").click()


def until(page: Any, found: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
    """What is found as soon as it is as wanted."""
    for _ in range(PATIENCE // 100):
        if wanted(value := found()):
            return value
        page.wait_for_timeout(100)
    raise AssertionError(f"still {value!r}")


def sources(page: Any, selector: str) -> list[str]:
    return page.locator(f"{selector} img").evaluate_all("all => all.map(one => one.src)")


def pixels(page: Any, source: str) -> np.ndarray:
    data = b64decode(source.partition(",")[2]) if source.startswith("data:") else page.request.get(source).body()
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def rows(page: Any, selector: str) -> list[list[str]]:
    body = page.locator(f"{selector} [role=row]:has([role=gridcell])")
    return body.evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('[role=gridcell]')].map(cell => cell.innerText.trim()))"
    )


def wanted_rows(studio: Studio, **change: Any) -> list[list[str]]:
    _, found = table(studio.draw(ORDER.__class__(**(ORDER.__dict__ | change))).group.scored)
    return [[str(cell) for cell in row] for row in found]


def message(page: Any) -> str:
    return page.locator(".toast-body").first.inner_text()


# --- generate -----------------------------------------------------------------


def test_generated_images_and_their_numbers_are_the_librarys(visitor: Any, studio: Studio) -> None:
    page = visitor()
    generate(page)
    assert until(page, lambda: rows(page, "#generate-table"), bool) == wanted_rows(studio)
    tiles = sources(page, "#generate-gallery")
    assert len(tiles) == 4 and all(pixels(page, tile).std() > 5 for tile in tiles)
    shown = sources(page, "#generate-cells")
    assert len(shown) == 3
    group = studio.draw(ORDER).group
    best = int(group.scored.rewards.argmax())
    own = np.asarray(group.scored.images[best]).astype(int)
    assert np.array_equal(pixels(page, shown[0])[::24, ::24], own)


def test_cells_tell_their_numbers_to_the_mouse_and_to_a_finger(visitor: Any, studio: Studio) -> None:
    group = studio.draw(ORDER).group
    second = int(group.scored.rewards.argsort(descending=True, stable=True)[1])
    for touch in (False, True):
        page = visitor(has_touch=touch)
        generate(page)
        page.locator("#generate-cells .map").first.wait_for()
        page.locator("#generate-gallery button").nth(1).click()  # the second best
        page.locator("#generate-cells figcaption", has_text=f"image {second}").wait_for()
        target = page.locator("#generate-cells .map").nth(1)
        target.scroll_into_view_if_needed()
        box = target.bounding_box()
        place = {"x": box["width"] * 0.6, "y": box["height"] * 0.3}  # row 2, column 3 of 4 × 4
        target.tap(position=place) if touch else target.hover(position=place)
        assert page.locator("#generate-cells output").inner_text() == cells(group, CreditSettings(), second)[6]


def test_contrast_normalizer_opacity_and_kind_redraw_without_the_model(
    visitor: Any, studio: Studio, monkeypatch: Any
) -> None:
    page = visitor()
    generate(page)
    page.locator("#generate-cells .map").first.wait_for()

    def none_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(studio, "draw", none_again)
    monkeypatch.setattr(studio.policy, "forward", none_again)
    before = sources(page, "#generate-gallery")
    changes: list[Callable[[], Any]] = [
        lambda: choose(page, "#generate-contrast", "js"),
        lambda: choose(page, "#generate-normalizer", "softmax"),
        lambda: page.get_by_label("advantage map").first.check(),
        lambda: (page.locator("#generate-opacity input[type=number]").fill("0.4"), page.keyboard.press("Tab")),
        lambda: page.get_by_label("picture", exact=True).first.check(),
    ]
    for change in changes:
        change()
        after = until(page, lambda: sources(page, "#generate-gallery"), lambda found, old=before: found != old)
        assert (pixels(page, after[0]) != pixels(page, before[0])).any()
        before = after


def test_the_map_changes_with_the_negative_prompt_and_says_when_there_is_none(visitor: Any) -> None:
    page = visitor()
    generate(page)
    page.locator("#generate-cells .map").first.wait_for()
    first = sources(page, "#generate-cells")
    generate(page, negative="a blue square")
    second = until(
        page, lambda: sources(page, "#generate-cells"), lambda found: found != first and len(found) == len(first)
    )
    assert (pixels(page, second[1]) != pixels(page, first[1])).any()
    generate(page, negative=ORDER.text)
    until(page, lambda: len(sources(page, "#generate-cells")), lambda count: count == 1)
    said = "the negative prompt is the prompt itself"
    until(page, page.locator("#generate-notes").inner_text, lambda text: said in text)


def test_numbers_can_be_saved(visitor: Any, studio: Studio) -> None:
    page = visitor()
    generate(page)
    page.locator("#generate-cells .map").first.wait_for()
    page.locator("#generate-save").click()
    page.locator("#generate-files a[href]").nth(1).wait_for()
    links = page.locator("#generate-files a[href]").evaluate_all("all => all.map(one => one.href)")
    with np.load(BytesIO(page.request.get(next(link for link in links if link.endswith(".npz"))).body())) as saved:
        assert np.array_equal(saved["tokens"], studio.draw(ORDER).group.scored.tokens.numpy())
    about = json.loads(page.request.get(next(link for link in links if link.endswith(".json"))).body())
    assert (about["prompt"], about["seed"]) == (ORDER.text, ORDER.seed)


@pytest.mark.parametrize(
    ("text", "told"), [("", "the prompt is empty"), ("<b>x</b>" * 1251, "10,008 characters, starting with '<b>x</b>")]
)
def test_prompts_that_cannot_be_are_messages(visitor: Any, text: str, told: str) -> None:
    page = visitor()
    generate(page, text)
    assert told in message(page) and "Traceback" not in page.content()


def test_unknown_words_are_named_as_they_were_typed(visitor: Any) -> None:
    page = visitor()
    generate(page, "<img src=x onerror=document.title='hacked'> ein Kreis")
    page.locator("#generate-notes li").first.wait_for()
    assert "ein" in page.locator("#generate-notes").inner_text() and page.title() != "hacked"
    assert page.locator("#generate-notes img").count() == 0


def test_two_visitors_at_once_get_their_own(visitor: Any, studio: Studio) -> None:
    pages = [visitor(), visitor()]
    for seed, page in enumerate(pages):
        generate(page, seed=seed)
    wanted = [wanted_rows(studio, seed=seed) for seed in range(2)]
    assert wanted[0] != wanted[1]
    for page, own in zip(pages, wanted, strict=True):
        until(page, lambda page=page: rows(page, "#generate-table"), lambda found, own=own: found == own)


# --- explain ------------------------------------------------------------------


def test_a_picture_of_ones_own_is_explained(visitor: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    Image.fromarray(noise, "RGBA").save(tmp_path / "noise.png")
    page = visitor()
    open_tab(page, "Explain an image")
    page.locator("#explain-go").click()
    assert "no picture yet" in message(page)
    page.locator("#explain-upload input[type=file]").set_input_files(tmp_path / "noise.png")
    page.locator("#explain-picture img").wait_for()
    page.locator("#explain-prompt textarea").fill("a red circle and a blue square")
    page.locator("#explain-phrases textarea").fill("red, square")
    page.locator("#explain-go").click()
    shown = until(page, lambda: sources(page, "#explain-cells"), lambda found: len(found) == 5)
    assert all(pixels(page, source).std() > 5 for source in shown)
    maps = [pixels(page, source) for source in shown[2:]]
    assert (maps[0] != maps[1]).any() and (maps[1] != maps[2]).any()
    assert page.locator("#explain-cells figcaption").all_inner_texts()[3:] == ["credit of “red”", "credit of “square”"]
    assert "Transparent parts were put on white" in page.locator("#explain-notes").inner_text()
    choose(page, "#explain-contrast", "abs")
    choose(page, "#explain-normalizer", "mean")
    until(page, lambda: sources(page, "#explain-cells"), lambda found: found[2] != shown[2])


@pytest.mark.parametrize(
    ("content", "told"), [(b"no picture", "cannot be read as a picture"), (huge_png(), "32 million pixels")]
)
def test_files_that_are_no_pictures_are_messages(visitor: Any, tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "file.png").write_bytes(content)
    page = visitor()
    open_tab(page, "Explain an image")
    page.locator("#explain-upload input[type=file]").set_input_files(tmp_path / "file.png")
    assert told in message(page)


# --- training run -------------------------------------------------------------


def line_of(page: Any, plot: int) -> str | None:
    """The path of a plot's curve, in pixels."""
    path = page.locator(f"#training-plot-{plot} svg .mark-line path")
    return path.first.get_attribute("d") if path.count() else None


def test_a_run_that_goes_on_is_followed_until_it_vanishes(
    visitor: Any, studio: Studio, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(studio, "runs_dir", tmp_path)
    folder = tmp_path / "going"
    write_run(folder, steps=20, rows=4)
    page = visitor()
    open_tab(page, "Training run")
    status = page.locator("#training-status")
    until(page, status.inner_text, lambda text: text.startswith("step 4 of 20"))
    drawn = [until(page, lambda plot=plot: line_of(page, plot), bool) for plot in (0, 1)]
    assert drawn[0] != drawn[1]
    first = until(page, lambda: sources(page, "#training-samples"), bool)
    assert (pixels(page, first[0])[0, 0] == (200, 0, 0)).all()

    Image.new("RGB", (40, 20), (0, 99, 0)).save(folder / "samples" / "step-000006.png")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward": 0.9, "entropy": 0.2}\n{"step": 7, "rew')
    until(page, status.inner_text, lambda text: text.startswith("step 6 of 20"))
    second = until(page, lambda: sources(page, "#training-samples"), lambda found: found and found != first)
    assert (pixels(page, second[0])[0, 0] == (0, 99, 0)).all()

    page.locator("#training-step input[type=number]").fill("2")
    page.keyboard.press("Tab")
    third = until(page, lambda: sources(page, "#training-samples"), lambda found: found and found != second)
    assert (pixels(page, third[0])[0, 0] == (100, 0, 0)).all()
    choose(page, "#training-metric", "reward")
    until(page, lambda: line_of(page, 1), lambda line: line and line == line_of(page, 0))

    shutil.rmtree(folder)
    until(page, status.inner_text, lambda text: "not there any more" in text)


# --- compare ------------------------------------------------------------------


def test_base_and_trained_policy_side_by_side(visitor: Any, studio: Studio) -> None:
    page = visitor()
    open_tab(page, "Compare")
    until(page, lambda: page.locator("#compare-run input").input_value(), lambda value: value == "one")
    page.locator("#compare-prompt textarea").fill(ORDER.text)
    page.locator("#compare-go").click()
    before, after = (
        until(page, lambda side=side: sources(page, f"#compare-{side}"), lambda found: len(found) == 4)
        for side in ("before", "after")
    )
    base, trained = studio.compare(ORDER.__class__(**(ORDER.__dict__ | {"seed": 0})), "one")
    for shown, answer in ((before, base), (after, trained)):
        own = np.asarray(answer.group.scored.images[2]).astype(int)
        assert np.array_equal(pixels(page, shown[2])[::24, ::24], own)
    scores = [np.mean(answer.group.scored.scores["bright"]) for answer in (base, trained)]
    text = page.locator("#compare-summary").inner_text()
    assert re.findall(r"bright\s+(\S+)\s+(\S+)", text) == [tuple(f"{score:.3f}" for score in scores)]


# --- reasoning ----------------------------------------------------------------


def test_the_default_question_is_answered_with_the_credit_of_every_token(visitor: Any, studio: Studio) -> None:
    page = visitor()
    reasoning(page)
    boxes = CotHeatmapConfig().prompt, DEFAULT_ANSWER, WRONG_ON_PURPOSE, 4, 1.0, 0, CONTRASTS[0], NORMALIZERS[0]
    wanted = drawn(Reasoner(studio).ask(EMBEDDED_MODEL, order(*boxes)))
    spans = page.locator("#reasoning-answers .token")
    assert spans.evaluate_all("all => all.map(one => one.title)") == re.findall(r'title="(.*?)"', wanted)
    assert page.locator("#reasoning-answers h2").all_inner_texts() == re.findall("<h2>(.*?)</h2>", wanted)
    colours = spans.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(colours)) > 10


# --- the whole page -----------------------------------------------------------


def test_the_model_that_ships_draws_what_its_prompt_says(browser: Any) -> None:
    """The page as `gcpo-t2i demo` starts it: GenEval's reasons, and every reward."""
    from gcpo_t2i.config import DemoConfig

    own = Studio(DemoConfig(device="cpu"))
    page_of = build(own)
    address = serve(page_of, own, block=False)
    page = browser.new_page()
    try:
        page.set_default_timeout(3 * PATIENCE)
        page.goto(address)
        generate(page, "a photo of a red circle", seed=0)
        page.locator("#generate-cells .map").first.wait_for()
        found = until(page, lambda: rows(page, "#generate-table"), bool)
        assert found == wanted_rows(own, text="a photo of a red circle", seed=0)
        assert all(row[-1] == "correct" or row[-1].startswith("expected") for row in found)
        assert page.locator("#generate-table th").all_inner_texts().count("aesthetic") >= 1
    finally:
        page.close()
        page_of.close()
    assert torch.is_grad_enabled()
