"""What the tabs have in common: the boxes that an order and a view come from, and errors as messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any, NamedTuple, ParamSpec, TypeVar

import gradio as gr
from gradio.components import Component

from gcpo_t2i.algo.credit import CONTRASTS, NORMALIZERS
from gcpo_t2i.demo.studio import BOUNDS
from gcpo_t2i.demo.views import ADVANTAGE, CREDIT, PICTURE, View, table
from gcpo_t2i.errors import UserError
from gcpo_t2i.maps.scored import ScoredImages

P = ParamSpec("P")
T = TypeVar("T")

PROGRESS = gr.Progress()  # as a default argument, the first: so Gradio knows that a function tells how far it is
PROMPT = "a photo of a red circle and a blue square"
EXAMPLES = [
    PROMPT,
    "a photo of two green stars",
    "a photo of a yellow heart",
    "a photo of a triangle above a ring",
]
# One at a time on the model, whichever tab asks; drawing what is there does not wait for it.
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
DRAWING: dict[str, Any] = {
    "concurrency_id": "drawing",
    "concurrency_limit": 4,
    "api_visibility": "private",
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}


def friendly(function: Callable[P, T]) -> Callable[P, T]:
    """What the visitor can mend becomes a message on the page, instead of a stack trace in the log."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(escape(str(error)), title="This cannot be done", print_exception=False) from error

    return called


class OrderBoxes(NamedTuple):
    """In the order of the fields of `studio.Order`."""

    text: gr.Textbox
    negative: gr.Textbox
    group: gr.Slider
    guidance: gr.Slider
    temperature: gr.Slider
    seed: gr.Number


def prompt_boxes(name: str) -> tuple[gr.Textbox, gr.Textbox]:
    text = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=4, elem_id=f"{name}-prompt")
    negative = gr.Textbox(
        label="Negative prompt",
        placeholder="none: the model's own empty prompt",
        info="What guidance leads away from, and what the credit compares with",
        max_lines=3,
        elem_id=f"{name}-negative",
    )
    return text, negative


def order_boxes(name: str, group: int, max_images: int) -> OrderBoxes:
    text, negative = prompt_boxes(name)
    gr.Examples([[prompt] for prompt in EXAMPLES], [text], label="Examples", api_visibility="private")
    with gr.Accordion("Sampling", open=False):
        images = gr.Slider(
            1, max_images, min(group, max_images), step=1, label="Images in the group", elem_id=f"{name}-group"
        )
        guidance = gr.Slider(*BOUNDS["guidance"], value=2.0, step=0.5, label="Guidance", info="1 = none")
        temperature = gr.Slider(*BOUNDS["temperature"], value=1.0, step=0.1, label="Temperature")
        seed = gr.Number(0, label="Seed", precision=0, elem_id=f"{name}-seed")
    return OrderBoxes(text, negative, images, guidance, temperature, seed)


def view_boxes(name: str, kind: str | None) -> list[Component]:
    """In the order of the fields of `views.View`. `kind` is what is shown at first; None where there is no choice."""
    with gr.Row():
        shown = gr.Radio(
            [("credit", CREDIT), ("advantage map", ADVANTAGE), ("picture", PICTURE)],
            value=kind,
            label="Show",
            scale=3,
            min_width=410,
            visible=kind is not None,
            elem_id=f"{name}-kind",
        )
        opacity = gr.Slider(
            0, 1, View.opacity, step=0.05, label="Opacity", scale=2, min_width=150, elem_id=f"{name}-opacity"
        )
        contrast = gr.Dropdown(
            list(CONTRASTS), value=View.contrast, label="Contrast", min_width=110, elem_id=f"{name}-contrast"
        )
        normalizer = gr.Dropdown(
            list(NORMALIZERS), value=View.normalizer, label="Normalizer", min_width=160, elem_id=f"{name}-normalizer"
        )
    return [shown, opacity, contrast, normalizer]


def on_change(
    boxes: Sequence[Any], function: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Draws again, without the model, whenever one of the boxes is changed by hand."""
    gr.on([box.input for box in boxes], friendly(function), [*inputs], [*outputs], **DRAWING)


def tile_gallery(label: str, elem_id: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        format="png",
        buttons=[],
        elem_id=elem_id,
        elem_classes="tiles",
    )


def score_table(name: str) -> gr.Dataframe:
    return gr.Dataframe(
        label="Scores",
        interactive=False,
        wrap=True,
        max_height=1000,
        buttons=[],
        elem_classes="scores",
        elem_id=f"{name}-table",
    )


def filled_table(scored: ScoredImages) -> gr.Dataframe:
    """An update of `score_table`: narrow columns of numbers, and the rest for the reason."""
    headers, rows = table(scored)
    widths: list[str | int] = [*["92px"] * (len(headers) - 1), "320px"]
    return gr.Dataframe(headers=headers, value=rows, column_widths=widths)


def notes_box(notes: Sequence[str]) -> gr.HTML:
    """Remarks as a list, if there are any; they quote what the visitor typed."""
    items = "".join(f"<li>{escape(note[:1].upper() + note[1:])}.</li>" for note in notes)
    return gr.HTML(f'<ul class="notes">{items}</ul>', visible=bool(notes))
