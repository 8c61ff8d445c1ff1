"""The tab that draws a group of images and shows where each got its credit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from gcpo_t2i.demo.cellmap import cell_map, render
from gcpo_t2i.demo.controls import (
    DRAWING,
    MODEL,
    PROGRESS,
    filled_table,
    friendly,
    notes_box,
    on_change,
    order_boxes,
    score_table,
    tile_gallery,
    view_boxes,
)
from gcpo_t2i.demo.studio import Answer, Order, Studio
from gcpo_t2i.demo.views import CREDIT, View, cells, panels, tiles
from gcpo_t2i.errors import UserError
from gcpo_t2i.maps.arrays import ARRAYS, DESCRIPTION, write_arrays
from gcpo_t2i.maps.results import Scales, best_first

WHAT = """\
A group of images of one prompt. Each is scored, and compared with the others: that is its **advantage**. The **credit** says
which parts of it the prompt decided: how far the model's predictions with and without the prompt disagree. Training
reinforces or suppresses every part by **credit × advantage**."""


def generate_tab(studio: Studio) -> None:
    gr.Markdown(WHAT)
    answer, chosen, kept = gr.State(), gr.State(0), gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            order = order_boxes("generate", 8, studio.config.max_images)
            button = gr.Button("Generate", variant="primary", elem_id="generate-go")
        with gr.Column(scale=3, min_width=300):
            notes = gr.HTML(visible=False, elem_id="generate-notes")
            view = view_boxes("generate", CREDIT)
            gr.Markdown("The group, best first, each with its advantage. Choose an image to look into it.")
            gallery = tile_gallery("The group", "generate-gallery", 4)
            with gr.Column(visible=False) as details:
                inspected = cell_map("generate-cells")
                scores = score_table("generate")
                save = gr.Button("Save the numbers", size="sm", elem_id="generate-save")
                files = gr.File(label="Arrays, and what they are of", visible=False, elem_id="generate-files")

    def draw(progress: gr.Progress = PROGRESS, *boxes: Any) -> list[Any]:
        shown = View(*boxes[len(order) :])
        found = studio.draw(Order(*boxes[: len(order)]), progress)
        drawn = [*redraw(found, 0, shown), filled_table(found.group.scored), gr.File(None, visible=False)]
        return [found, 0, gr.Column(visible=True), notes_box(found.notes), *drawn]

    def redraw(found: Answer, index: int, shown: View) -> list[Any]:
        scales = Scales.of([found.group], shown.settings)
        return [tiles(found.group, shown, scales, best_first(found.group.scored)), inspect(found, index, shown)]

    def on_view(found: Answer | None, index: int, *boxes: Any) -> list[Any]:
        return [gr.skip(), gr.skip()] if found is None else redraw(found, index, View(*boxes))

    def on_select(found: Answer, event: gr.SelectData, *boxes: Any) -> list[Any]:
        return [event.index, inspect(found, event.index, View(*boxes))]

    outputs = [answer, chosen, details, notes, gallery, inspected, scores, files]
    button.click(friendly(draw), [*order, *view], outputs, show_progress_on=[gallery], **MODEL)
    on_change(view, on_view, [answer, chosen, *view], [gallery, inspected])
    gallery.select(friendly(on_select), [answer, *view], [chosen, inspected], **DRAWING)
    save.click(friendly(arrays), [answer, *view], [files, kept], **DRAWING)


def inspect(answer: Answer, index: int, view: View) -> str:
    """The image at this place of the gallery with its maps, as HTML."""
    scored = answer.group.scored
    i = best_first(scored)[index]
    scales = Scales.of([answer.group], view.settings)
    return render(panels(answer.group, view, scales, i), scored.grid, cells(answer.group, view.settings, i))


def arrays(answer: Answer | None, *view: Any) -> list[Any]:
    """Two files to be downloaded, and their folder, which is deleted when the session lets go of it."""
    if answer is None:
        raise UserError("there are no images yet; generate some first")
    folder = tempfile.TemporaryDirectory(prefix="gcpo-t2i-")
    path, settings = Path(folder.name), View(*view).settings
    group = answer.group
    write_arrays(path, group.scored, settings, group.phrases, model=group.model, seed=answer.seed)
    return [gr.File([str(path / ARRAYS), str(path / DESCRIPTION)], visible=True), folder]
