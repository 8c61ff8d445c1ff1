"""The demo without a browser: what visitors ask for, runs that are half written, what is drawn and what is escaped."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import threading
import zlib
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.config import DemoConfig, RewardConfig, validate
from gcpo_t2i.data import described
from gcpo_t2i.demo import explain, runs, training
from gcpo_t2i.demo.cellmap import Panel, render
from gcpo_t2i.demo.command import demo, is_local
from gcpo_t2i.demo.controls import friendly, notes_box
from gcpo_t2i.demo.generate import arrays
from gcpo_t2i.demo.page import build, choices, serve
from gcpo_t2i.demo.studio import Answer, Order, Studio
from gcpo_t2i.demo.views import ADVANTAGE, CREDIT, PICTURE, View, cells, panels, table, tiles
from gcpo_t2i.errors import UserError
from gcpo_t2i.maps.draw import overlay
from gcpo_t2i.maps.pictures import Picture, read_picture
from gcpo_t2i.maps.results import Scales
from gcpo_t2i.maps.scored import sample_images
from gcpo_t2i.rollout import Sampling
from gcpo_t2i.run import load_model
from tests.tiny import tiny_policy

ORDER = Order("a red circle and a blue square", None, 4, 2.0, 1.0, 3)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run. Read only."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    write_run(folder / "one", steps=4)
    tiny_policy(seed=1).save_pretrained(folder / "one" / "policy")
    return folder


def write_run(folder: Path, steps: int, rows: int | None = None) -> None:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"steps: {steps}\n")
    last = steps if rows is None else rows
    lines = [{"step": step, "reward": step / 10, "entropy": 1.0 - step / 10, "kl": None} for step in range(1, last + 1)]
    lines.insert(0, {"step": 0, "eval/geneval/strict": 0.25, "eval/geneval/strict_ci95": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(2, last + 1, 2):
        Image.new("RGB", (40, 20), (50 * step, 0, 0)).save(folder / "samples" / f"step-{step:06d}.png")


@pytest.fixture(scope="module")
def studio(tiny_folder: Path, reward_file: Path, runs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    blind = tmp_path_factory.mktemp("detector") / "blind.py"  # that of ShapesWorld wants larger images
    blind.write_text("def detect(images):\n    return [[] for _ in images]\n")
    rewards = [RewardConfig(f"{reward_file}:bright"), RewardConfig("geneval", 0.0, {"detector": f"{blind}:detect"})]
    return Studio(
        DemoConfig(model=str(tiny_folder), runs_dir=str(runs_dir), rewards=rewards, device="cpu", max_images=6)
    )


@pytest.fixture(scope="module")
def answer(studio: Studio) -> Answer:
    return studio.draw(ORDER)


# --- settings -----------------------------------------------------------------


def test_users_from_the_command_line_and_from_a_file(tmp_path: Path) -> None:
    assert DemoConfig().users() is None
    assert DemoConfig(auth="ann:a:b").users() == [("ann", "a:b")]
    (tmp_path / "users.txt").write_text("ann:1\n\nbob:2\n")
    assert DemoConfig(auth=str(tmp_path / "users.txt")).users() == [("ann", "1"), ("bob", "2")]


@pytest.mark.parametrize("auth", ["secret", ":secret", "ann:", ""])
def test_users_that_cannot_be_and_no_error_that_shows_them(auth: str) -> None:
    with pytest.raises(UserError, match=r"^auth ") as caught:
        validate(DemoConfig(auth=auth))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [DemoConfig(port=0), DemoConfig(port=70000), DemoConfig(rewards=[]), DemoConfig(max_images=0)]
)
def test_settings_that_cannot_be(config: DemoConfig) -> None:
    with pytest.raises(UserError):
        validate(config)


def test_hosts_of_this_machine() -> None:
    assert all(map(is_local, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.0.2", "example.org")))


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.9", "no such host"])
def test_addresses_that_cannot_be_listened_on_are_a_line_before_a_model_is_loaded(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=f"cannot listen on {host}:"):
        demo(DemoConfig(host=host, port=taken.getsockname()[1], model="/no/such/model"))


# --- orders -------------------------------------------------------------------


def test_a_drawn_group_is_the_librarys(studio: Studio, answer: Answer, tiny_folder: Path) -> None:
    policy = load_model(str(tiny_folder), torch.device("cpu"))
    own = sample_images(
        policy, described(ORDER.text), studio.rewards, Sampling(4, 2.0), torch.Generator().manual_seed(3)
    )
    assert torch.equal(own.tokens, answer.group.scored.tokens)
    assert torch.equal(own.rewards, answer.group.scored.rewards) and own.rewards.unique().numel() > 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text": ""}, "prompt is empty"),
        ({"text": "  \n"}, "prompt is empty"),
        ({"text": "a" * 10_001}, "10,001 characters"),
        ({"negative": "a" * 10_001}, "negative prompt of 10,001"),
        ({"group": 7}, "group must be a number from 1 to 6"),
        ({"group": None}, "group must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": None}, "seed must be"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"temperature": 0}, "temperature must be"),
    ],
)
def test_orders_that_cannot_be(studio: Studio, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        studio.draw(replace(ORDER, **change))


def test_a_long_prompt_and_one_of_unknown_words_are_drawn_with_remarks(studio: Studio) -> None:
    notes = " ".join(studio.draw(replace(ORDER, text="ein blauer Kreis " + "x " * 4991, group=1)).notes)
    assert "does not know" in notes and "'ein', 'blauer', 'Kreis'" in notes and "does not read" in notes


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_negative_prompt_that_is_the_prompt_draws_no_map(studio: Studio, guidance: float) -> None:
    found = studio.draw(replace(ORDER, negative=ORDER.text + " ", guidance=guidance))
    assert any("no credit map" in note for note in found.notes)
    scales = Scales.of([found.group], CreditSettings())
    assert len(panels(found.group, View(), scales, 0)) == 1
    bare, _ = tiles(found.group, View(PICTURE), scales, [0])[0]
    for kind in (CREDIT, ADVANTAGE):
        assert tiles(found.group, View(kind), scales, [0])[0][0].tobytes() == bare.tobytes()
    assert "credit" not in cells(found.group, CreditSettings(), 0)[0]


def test_progress_ends_at_the_last_code(studio: Studio) -> None:
    told: list[tuple[float, str]] = []
    studio.draw(replace(ORDER, group=2), lambda done, what: told.append((done, what)))
    assert told[0][0] == 0.0 and told[-1] == (1.0, "drawing 2 images")
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) > 10


def test_two_at_once_get_what_they_would_get_alone(studio: Studio) -> None:
    orders = [replace(ORDER, seed=seed) for seed in range(4)]
    alone = [studio.draw(order).group.scored.tokens for order in orders]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: studio.draw(orders[i]).group.scored.tokens}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[i], found[i]) for i in range(4))


def test_comparison_of_two_policies(studio: Studio, answer: Answer) -> None:
    before, after = studio.compare(ORDER, "one")
    assert torch.equal(before.group.scored.tokens, answer.group.scored.tokens)
    trained = sample_images(
        tiny_policy(seed=1), described(ORDER.text), studio.rewards, Sampling(4, 2.0), torch.Generator().manual_seed(3)
    )
    assert torch.equal(after.group.scored.tokens, trained.tokens) and not torch.equal(
        after.group.scored.tokens, before.group.scored.tokens
    )


@pytest.mark.parametrize("run", ["../one", "/etc", "one/policy", "", None, "two", "one/"])
def test_only_runs_of_the_list_are_opened(studio: Studio, run: str | None) -> None:
    with pytest.raises(UserError, match=r"no run is chosen|not there any more"):
        studio.compare(ORDER, run)


# --- pictures of visitors -----------------------------------------------------


def as_picture(image: Image.Image) -> Picture:
    file = BytesIO()
    image.save(file, "PNG")
    return read_picture(file)


def huge_png() -> bytes:
    """The beginning of a picture of 20,000 × 20,000 pixels, and nothing behind it."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")
    parts = [
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own)) for name, own in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_explained_picture_has_a_map_for_the_prompt_and_for_each_phrase(studio: Studio) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 4), np.uint8), "RGBA")
    found = studio.explain(as_picture(image), "a red circle and a blue square", None, "red, blue  square,red,")
    assert list(found.group.phrases) == ["red", "blue  square"]
    assert any("transparent" in note for note in found.notes) and any("16 × 16" in note for note in found.notes)
    assert not any("advantage" in note for note in found.notes)
    shown = panels(found.group, View(), Scales.of([found.group], CreditSettings()), 0)
    assert [panel.title for panel in shown] == [
        "the picture",
        "what its codes hold",
        "credit",
        "credit of “red”",
        "credit of “blue  square”",
    ]
    assert "advantage" not in table(found.group.scored)[0]
    assert "credit of “red”" in cells(found.group, CreditSettings(), 0)[5]


@pytest.mark.parametrize(
    ("picture", "phrases", "told"),
    [
        (None, "", "no picture yet"),
        (Picture(Image.new("RGB", (16, 16))), "green", "'green' is not in the prompt"),
        (Picture(Image.new("RGB", (16, 16))), "a,red,circle,and,blue,square,red circle", "6 are the most"),
    ],
)
def test_pictures_and_phrases_that_cannot_be(studio: Studio, picture: Picture, phrases: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        studio.explain(picture, "a red circle and a blue square", None, phrases)


def test_uploads_are_pictures_or_errors(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "red.jpg")
    picture, preview = explain.show_upload(str(tmp_path / "red.jpg"))
    assert picture.image.size == (2000, 1000) and preview.visible
    (tmp_path / "no.png").write_text("<svg>no picture</svg>")
    (tmp_path / "huge.png").write_bytes(huge_png())
    for name, told in {"no": "cannot be read", "huge": "32 million pixels", "gone": "not there any more"}.items():
        with pytest.raises(UserError, match=told):
            explain.show_upload(str(tmp_path / f"{name}.png"))


def test_scenes_of_prompts() -> None:
    assert explain.draw_scene("a photo of a red circle")[0].image.size == (48, 48)
    with pytest.raises(UserError, match="words of ShapesWorld"):
        explain.draw_scene("a zebra")


# --- what is shown ------------------------------------------------------------


def test_tiles_are_overlays_in_the_order_that_is_asked_for(answer: Answer) -> None:
    group, view = answer.group, View(CREDIT, 0.5, "js", "mean")
    scales = Scales.of([group], view.settings)
    drawn = tiles(group, view, scales, [2, 0])
    values = group.scored.credit(view.settings)[2].view(4, 4)
    assert drawn[0][0].tobytes() == overlay(group.scored.images[2], values, scales.credit, 0.5).tobytes()
    assert [text.partition(":")[0] for _, text in drawn] == ["image 2", "image 0"]


def test_cells_say_what_the_tensors_say(answer: Answer) -> None:
    scored = answer.group.scored
    line = cells(answer.group, CreditSettings(), 1)[6]
    credit, advantage = scored.credit(CreditSettings()), scored.advantage_map(CreditSettings())
    assert line.startswith(f"row 2, column 3 · code {scored.tokens[1, 6]} · ")
    numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d\d", line)]
    wanted = [scored.tensors["cond_logp"], scored.tensors["null_logp"], credit, advantage]
    assert numbers == pytest.approx([tensor[1, 6].item() for tensor in wanted], abs=0.00501)


def test_the_table_is_best_first(answer: Answer) -> None:
    headers, rows = table(answer.group.scored)
    assert headers == ["image", "bright", "geneval", "reward", "advantage", "GenEval says"]
    rewards = answer.group.scored.rewards
    assert [row[0] for row in rows] == rewards.argsort(descending=True, stable=True).tolist()
    assert [row[3] for row in rows] == [f"{rewards[row[0]]:.3f}" for row in rows]
    assert all("expected" in row[5] and "\n" not in row[5] for row in rows)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="log_ratio"):
        View(CREDIT, 0.5, "log_ratio", "mean")


def test_nothing_that_was_typed_becomes_html() -> None:
    evil = "<img src=x onerror=alert(1)> \" ' &"
    shown = render([Panel(evil, Image.new("RGB", (4, 4)), meaning=evil)], (1, 1), [evil])
    notes = notes_box([evil]).value
    assert "<img src=x" not in shown + notes and shown.count("&lt;img src=x") == 4
    with pytest.raises(gr.Error) as caught:
        friendly(lambda: (_ for _ in ()).throw(UserError(evil)))()
    assert "<img" not in caught.value.message and not caught.value.print_exception


def test_cell_maps_hold_their_images(answer: Answer) -> None:
    shown = panels(answer.group, View(), Scales.of([answer.group], CreditSettings()), 0)
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', render(shown, (4, 4), ["x"] * 16))
    assert len(sources) == 3
    for source, panel in zip(sources, shown, strict=True):
        with Image.open(BytesIO(b64decode(source))) as image:
            assert image.tobytes() == panel.image.tobytes()


def test_arrays_are_files_that_go_with_the_session(answer: Answer) -> None:
    update, folder = arrays(answer, CREDIT, 0.5, "abs", "mean")
    path = Path(folder.name)
    assert {file.name for file in path.iterdir()} == {"arrays.npz", "arrays.json"} and update.visible
    settings = CreditSettings(contrast="abs", normalizer="mean")
    with np.load(path / "arrays.npz", allow_pickle=False) as saved:
        assert np.array_equal(saved["credit"], answer.group.scored.credit(settings).numpy())
    about = json.loads((path / "arrays.json").read_text())
    assert (about["seed"], about["credit"]["contrast"]) == (3, "abs")
    del folder
    assert not path.exists()
    with pytest.raises(UserError, match="no images yet"):
        arrays(None)


# --- runs ---------------------------------------------------------------------


def test_runs_are_found_below_their_folder_and_links_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for number, name in enumerate(("old", "new", "compare/grpo-seed0", "a/b/c/deep", ".hidden")):
        write_run(root / name, steps=2)
        os.utime(root / name / "metrics.jsonl", (number, number))
    (root / "empty").mkdir()
    write_run(tmp_path / "elsewhere", steps=2)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert runs.list_runs(root) == ["compare/grpo-seed0", "new", "old"]
    assert runs.list_runs(tmp_path / "nothing") == []


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=8, rows=4)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 5, "reward": 0.5, "név'.encode()[:-1])
    whole = (tmp_path / "run" / "samples" / "step-000004.png").read_bytes()
    (tmp_path / "run" / "samples" / "step-000006.png").write_bytes(whole[:40])
    state = runs.read_run(tmp_path, "run")
    assert [row["step"] for row in state.rows] == [0, 1, 2, 3, 4] and list(state.pictures) == [2, 4, 6]
    assert runs.status(state) == "step 4 of 8 · not finished · held-out strict GenEval 0.250"
    assert runs.curve(state.rows, "reward") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert runs.curve_names(state.rows) == ["eval/geneval/strict", "reward", "entropy"]
    assert runs.read_samples(state, 6) is None
    picture = runs.read_samples(state, 4)
    assert picture is not None and picture.getpixel((0, 0)) == (200, 0, 0)


def test_a_run_that_vanishes(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=8)
    state = runs.read_run(tmp_path, "run")
    shutil.rmtree(tmp_path / "run")
    assert runs.read_samples(state, 4) is None
    with pytest.raises(UserError, match="not there any more"):
        runs.read_run(tmp_path, "run")


def test_damaged_settings_and_metrics_are_no_reason_to_fail(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=8)
    (tmp_path / "run" / "config.yaml").write_text("steps: [")
    (tmp_path / "run" / "metrics.jsonl").write_text('[]\n{"step": "x"}\n{"reward": 1}\n\n{"step": 1, "reward": NaN}\n')
    state = runs.read_run(tmp_path, "run")
    assert (state.steps, state.last, runs.curve(state.rows, "reward")) == (None, 1, [])
    assert len(training.curves(state, "gone")) == 3


def test_the_step_slider_takes_the_nearest_picture(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=8)
    state = runs.read_run(tmp_path, "run")
    assert [training.nearest(state, at) for at in (None, 0, 3, 5.2, 99)] == [8, 2, 2, 6, 8]
    assert training.nearest(replace(state, pictures={}), 3) is None
    assert not training.slider(replace(state, pictures={}), 3).visible


def test_a_chosen_run_stays_chosen() -> None:
    assert choices(["b", "a"], "a").value == "a"
    assert (choices(["b", "a"], "gone").value, choices([], "gone").value) == ("b", None)


# --- the page -----------------------------------------------------------------


def test_what_the_server_offers(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "secret.txt").write_text("hidden")
    own = Studio.__new__(Studio)
    own.__dict__ |= studio.__dict__ | {"config": replace(studio.config, auth="ann:word", queue=3)}
    page = build(own)
    assert page._queue.max_size == 3 and not page.analytics_enabled
    assert {fn.api_visibility for fn in page.fns.values()} == {"private"}
    address = serve(page, own, block=False)
    try:
        assert address.startswith("http://127.0.0.1:") and page.share_url is None
        assert httpx.get(f"{address}config").status_code == 401
        with httpx.Client(base_url=address) as client:
            assert client.post("login", data={"username": "ann", "password": "wrong"}).status_code == 400
            assert client.post("login", data={"username": "ann", "password": "word"}).status_code == 200
            assert client.get("config").status_code == 200
            assert client.get(f"gradio_api/file={tmp_path / 'secret.txt'}").status_code == 403
            assert client.get(f"gradio_api/file={Path(__file__).parents[1] / 'pyproject.toml'}").status_code == 403
    finally:
        page.close()
