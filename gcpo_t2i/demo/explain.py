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
from gcpo_t2i.maps.results import Scales
from gcpo_t2i.shapes import render as render_scene
from gcpo_t2i.shapes import sample_scene
from gcpo_t2i.shapes.prompts import parse_prompt

WHAT = """\
A picture of your own, as if the model had drawn it for this prompt: where in it is the prompt? And where is each phrase? A
phrase's map compares the prompt with the prompt without that phrase."""


class Upload(gr.Image):
    """Hands over the uploaded file as it is, so that `maps.pictures` decides what is a picture, and says why it is none."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


def explain_tab(studio: Studio) -> None:
    gr.Markdown(WHAT)
    answer = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = Upload(
                label="Picture", sources=["upload", "clipboard"], height=240, buttons=[], elem_id="explain-picture"
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
        path, text, negative, phrases, *rest = boxes
        view = View(*rest)
        with open_upload(path) as file:
            found = studio.explain(file, text, negative, phrases or "", progress)
        return [found, notes_box(found.notes), draw(found, view), filled_table(found.group.scored)]

    def on_view(found: Answer | None, *boxes: Any) -> Any:
        return gr.skip() if found is None else draw(found, View(*boxes))

    button.click(friendly(explain), [picture, text, negative, phrases, *view], [answer, notes, shown, scores], **MODEL)
    scene.click(friendly(draw_scene), [text], [picture], api_visibility="private", show_progress="hidden")
    on_change(view, on_view, [answer, *view], [shown])


def open_upload(path: str | None) -> Any:
    """The file that Gradio stored for this upload. UserError if there is none, or not any more."""
    if path is None:
        raise UserError("there is no picture yet; drop one into the frame, or draw a scene")
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UserError("the picture is not there any more; drop it into the frame again") from error


def draw_scene(text: str) -> Image.Image:
    """An exact picture of a prompt in ShapesWorld's words. UserError for other prompts."""
    metadata = parse_prompt(text or "")
    if metadata is None:
        raise UserError(
            "only prompts in the words of ShapesWorld can be drawn as a scene, such as 'a photo of a red circle'"
        )
    return enlarge(Image.fromarray(render_scene(sample_scene(metadata, np.random.default_rng()))), LEAST)


def draw(answer: Answer, view: View) -> str:
    group = answer.group
    shown = panels(group, view, Scales.of([group], view.settings), 0)
    return render(shown, group.scored.grid, cells(group, view.settings, 0))
