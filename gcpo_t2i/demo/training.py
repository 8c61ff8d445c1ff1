"""The tab that follows a training run: its curves, its samples and their maps, step by step."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gcpo_t2i.demo.controls import friendly
from gcpo_t2i.demo.runs import RunState, curve, curve_names, list_runs, read_run, read_samples, status
from gcpo_t2i.demo.studio import Studio
from gcpo_t2i.errors import UserError

WHAT = "Runs below the folder that the demo was started with. One that is still going is followed."
EVERY = 5.0  # seconds between two looks at the folder
MAIN, ALSO = "reward", "entropy"
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def training_tab(studio: Studio) -> tuple[gr.Dropdown, gr.Timer]:
    """Returns the list of runs, which has to be kept up to date, and the timer, to go while the tab is looked at."""
    gr.Markdown(WHAT)
    seen = gr.State()
    timer = gr.Timer(EVERY, active=False)
    names = list_runs(studio.runs_dir)
    with gr.Row():
        run = gr.Dropdown(names, value=None, label="Run", scale=2, elem_id="training-run")
        other = gr.Dropdown([ALSO], value=ALSO, label="Second curve", scale=1, elem_id="training-metric")
    line = gr.Markdown("Choose a run." if names else nothing_there(studio), elem_id="training-status")
    with gr.Row():
        # No colours and no changing titles: the plot keeps those of the first curve, and draws nothing of a second one.
        plots = [
            gr.LinePlot(x="step", y="value", title=title, height=240, min_width=300, elem_id=f"training-plot-{i}")
            for i, title in enumerate(("Reward", "Second curve"))
        ]
    step = gr.Slider(0, 1, 0, step=1, label="Step", visible=False, elem_id="training-step")
    picture = gr.Image(
        label="Samples",
        show_label=False,  # it would lie on the first prompt
        visible=False,
        format="png",
        buttons=["fullscreen", "download"],
        elem_id="training-samples",
    )

    def show(name: str | None, metric: str, at: float | None) -> list[Any]:
        state = read_run(studio.runs_dir, name)
        return [signature(state), status(state), *curves(state, metric), slider(state, at), samples(state, at)]

    def on_run(name: str | None, metric: str) -> list[Any]:
        return show(name, metric, None) if name else [gr.skip()] * len(outputs)

    def follow(name: str | None, metric: str, at: float | None, before: Any) -> list[Any]:
        if not name:
            return [gr.skip()] * len(outputs)
        try:
            state = read_run(studio.runs_dir, name)
        except UserError as error:  # it may vanish while it is looked at: no message every few seconds
            return [None, str(error), *[gr.skip()] * (len(outputs) - 2)]
        if signature(state) == before:
            return [gr.skip()] * len(outputs)
        newest = before is not None and at is not None and at >= before[-1]
        return show(name, metric, None if newest else at)

    def at_step(name: str | None, at: float) -> list[Any]:
        state = read_run(studio.runs_dir, name)
        return [gr.Slider(label=label_of(state, at)), samples(state, at)]

    outputs = [seen, line, *plots, other, step, picture]
    run.change(friendly(on_run), [run, other], outputs, **HIDDEN)
    other.input(friendly(lambda name, metric, at: show(name, metric, at)), [run, other, step], outputs, **HIDDEN)
    step.input(friendly(at_step), [run, step], [step, picture], trigger_mode="always_last", **HIDDEN)
    timer.tick(friendly(follow), [run, other, step, seen], outputs, **HIDDEN)
    return run, timer


def nothing_there(studio: Studio) -> str:
    return "There are no runs yet. `gcpo-t2i train` makes one; `gcpo-t2i demo --runs_dir FOLDER` looks elsewhere."


def signature(state: RunState) -> tuple[int, int, int]:
    """What changes when the run has got further; last the newest step with a picture."""
    return len(state.rows), len(state.pictures), max(state.pictures, default=0)


def curves(state: RunState, metric: str) -> list[Any]:
    """The two plots, and the list of what the second may show."""
    names = curve_names(state.rows)
    metric = metric if metric in names else (ALSO if ALSO in names else next(iter(names), ALSO))
    return [frame(state, MAIN), frame(state, metric), gr.Dropdown(names or [ALSO], value=metric)]


def frame(state: RunState, metric: str) -> Any:
    import pandas

    return pandas.DataFrame(curve(state.rows, metric), columns=["step", "value"])


def nearest(state: RunState, at: float | None) -> int | None:
    """The step with pictures that is nearest to this one; None: the last one. None if there is none."""
    if not state.pictures:
        return None
    return max(state.pictures) if at is None else min(state.pictures, key=lambda step: (abs(step - at), step))


def label_of(state: RunState, at: float | None) -> str:
    return f"Samples of step {nearest(state, at)}"


def slider(state: RunState, at: float | None) -> Any:
    step = nearest(state, at)
    if step is None:
        return gr.Slider(visible=False)
    low, high = min(state.pictures), max(state.pictures)
    return gr.Slider(low, max(high, low + 1), step, label=label_of(state, at), visible=True)


def samples(state: RunState, at: float | None) -> gr.Image:
    step = nearest(state, at)
    image = None if step is None else read_samples(state, step)
    return gr.Image(image, visible=image is not None)
