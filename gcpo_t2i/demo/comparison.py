"""The tab that shows what training changed: two policies, the same prompt and seed."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gcpo_t2i.demo.controls import (
    MODEL,
    PROGRESS,
    friendly,
    notes_box,
    on_change,
    order_boxes,
    tile_gallery,
    view_boxes,
)
from gcpo_t2i.demo.runs import is_language_model, list_runs
from gcpo_t2i.demo.studio import Answer, Order, Studio
from gcpo_t2i.demo.views import PICTURE, View, tiles
from gcpo_t2i.maps.results import Scales

WHAT = """\
The model before training and the policy that a run made of it: same prompt, same seed, same colours. Images at the same place
began with the same random numbers."""


def comparison_tab(studio: Studio) -> gr.Dropdown:
    """Returns the list of runs, which has to be kept up to date."""
    gr.Markdown(WHAT)
    answers = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            run = gr.Dropdown(trained_runs(studio), label="Trained policy", elem_id="compare-run")
            order = order_boxes("compare", 4, studio.config.max_images)
            button = gr.Button("Compare", variant="primary", elem_id="compare-go")
        with gr.Column(scale=3, min_width=300):
            notes = gr.HTML(visible=False, elem_id="compare-notes")
            view = view_boxes("compare", PICTURE)
            galleries = []
            with gr.Row():
                for title, elem_id in (("Before training", "compare-before"), ("After training", "compare-after")):
                    with gr.Column(min_width=280):
                        gr.Markdown(f"**{title}**, each image with its advantage")
                        galleries.append(tile_gallery(title, elem_id, 2))
            summary = gr.Markdown(elem_id="compare-summary")

    def compare(progress: gr.Progress = PROGRESS, *boxes: Any) -> list[Any]:
        run, *rest = boxes
        view = View(*rest[len(order) :])
        found = studio.compare(Order(*rest[: len(order)]), run, progress)
        notes = list(dict.fromkeys(note for answer in found for note in answer.notes))
        return [found, notes_box(notes), *draw(found, view), rewards_line(found)]

    def on_view(found: tuple[Answer, Answer] | None, *boxes: Any) -> list[Any]:
        return [gr.skip(), gr.skip()] if found is None else draw(found, View(*boxes))

    button.click(friendly(compare), [run, *order, *view], [answers, notes, *galleries, summary], **MODEL)
    on_change(view, on_view, [answers, *view], galleries)
    return run


def trained_runs(studio: Studio) -> list[str]:
    """Runs with a policy that draws; those of language models are in the tab Reasoning."""
    policies = {name: studio.runs_dir / name / "policy" for name in list_runs(studio.runs_dir)}
    return [name for name, policy in policies.items() if policy.is_dir() and not is_language_model(policy)]


def draw(found: tuple[Answer, Answer], view: View) -> list[Any]:
    """Both groups in the order they were drawn in, on one scale."""
    scales = Scales.of([answer.group for answer in found], view.settings)
    return [tiles(answer.group, view, scales, range(len(answer.group.scored.rewards))) for answer in found]


def rewards_line(found: tuple[Answer, Answer]) -> str:
    """The mean of each reward over the group, before and after."""
    before, after = (answer.group.scored.scores for answer in found)
    lines = ["| mean of the group | before | after |", "|---|---|---|"]
    for name in before:
        means = [_mean(scores[name]) for scores in (before, after)]
        lines.append(f"| {name} | {means[0]} | {means[1]} |")
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{sum(found) / len(found):.3f}" if found else "–"
