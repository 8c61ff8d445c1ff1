"""The tab that shows where a prompt is in a given picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from gcpo_t2i.demo.cellmap import cell_map, render
from gcpo_t2i.demo.controls import (
    MODEL,
    PROGRESS,
    filled_table,
    friendly,
    notes_box,
    on_change,
    prompt_boxes,
    score_table,
    view_boxes,
)
from gcpo_t2i.demo.studio import Answer, Studio
from gcpo_t2i.demo.views import View, cells, panels
from gcpo_t2i.errors import UserError
from gcpo_t2i.images import enlarge
from gcpo_t2i.maps.draw import LEAST
from gcpo_t2i.maps.pictures import FORMATS, Picture, read_picture
from gcpo_t2i.maps.results import Scales
from gcpo_t2i.shapes import render as render_scene
from gcpo_t2i.shapes import sample_scene
from gcpo_t2i.shapes.prompts import parse_prompt

WHAT = """\
A picture of your own, as if the model had drawn it for this prompt: where in it is the prompt? And where is each phrase? A
phrase's map compares the prompt with the prompt without that phrase."""


SUFFIXES = (*FORMATS, "JPG")
PREVIEW = 512  # px


def explain_tab(studio: Studio) -> None:
    gr.Markdown(WHAT)
    picture, answer = gr.State(), gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            upload = gr.File(
                label="Picture",
                file_types=[f".{name.lower()}" for name in SUFFIXES],
                height=110,
                elem_id="explain-upload",
            )
            preview = gr.Image(
                label="Picture", interactive=False, visible=False, height=220, buttons=[], elem_id="explain-picture"
            )
            scene = gr.Button("No picture at hand? Draw the prompt", size="sm", elem_id="explain-scene")
            text, negative = prompt_boxes("explain")
            phrases = gr.Textbox(
                "red, blue square",
                label="Phrases",
                info="Words of the prompt, separated by commas: one map each",
                max_lines=2,
                elem_id="explain-phrases",
            )
            button = gr.Button("Explain", variant="primary", elem_id="explain-go")
        with gr.Column(scale=3, min_width=300):
            notes = gr.HTML(visible=False, elem_id="explain-notes")
            view = view_boxes("explain", None)
            shown = cell_map("explain-cells")
            scores = score_table("explain")

    def explain(progress: gr.Progress = PROGRESS, *boxes: Any) -> list[Any]:
        given, text, negative, phrases, *rest = boxes
        view = View(*rest)
        found = studio.explain(given, text, negative, phrases or "", progress)
        return [found, notes_box(found.notes), draw(found, view), filled_table(found.group.scored)]

    def on_view(found: Answer | None, *boxes: Any) -> Any:
        return gr.skip() if found is None else draw(found, View(*boxes))

    button.click(friendly(explain), [picture, text, negative, phrases, *view], [answer, notes, shown, scores], **MODEL)
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    upload.upload(friendly(show_upload), [upload], [picture, preview], **quick)
    upload.clear(lambda: [None, gr.Image(None, visible=False)], None, [picture, preview], **quick)
    scene.click(friendly(draw_scene), [text], [picture, preview, upload], **quick)
    on_change(view, on_view, [answer, *view], [shown])


def show_upload(path: str) -> list[Any]:
    """The picture in the file that Gradio stored, and a preview. UserError if it is none."""
    try:
        with Path(path).open("rb") as file:
            picture = read_picture(file)
    except OSError as error:
        raise UserError("the picture is not there any more; upload it again") from error
    small = picture.image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return [picture, gr.Image(small, visible=True)]


def draw_scene(text: str) -> list[Any]:
    """An exact picture of a prompt in ShapesWorld's words, and a preview. UserError for other prompts."""
    metadata = parse_prompt(text or "")
    if metadata is None:
        raise UserError("only prompts in the words of ShapesWorld can be drawn, such as 'a photo of a red circle'")
    image = Image.fromarray(render_scene(sample_scene(metadata, np.random.default_rng())))
    return [Picture(image), gr.Image(enlarge(image, LEAST), visible=True), None]


def draw(answer: Answer, view: View) -> str:
    group = answer.group
    shown = panels(group, view, Scales.of([group], view.settings), 0)
    return render(shown, group.scored.grid, cells(group, view.settings, 0))
