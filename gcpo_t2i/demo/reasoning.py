"""The tab for language models: answers to a question, every token coloured by its credit."""

from __future__ import annotations

from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from gcpo_t2i.config import CotHeatmapConfig, validate
from gcpo_t2i.config.cot import TextCreditConfig
from gcpo_t2i.cot.explain import Explained
from gcpo_t2i.cot.heatmap import DEFAULT_ANSWER, answer_html, explained, most
from gcpo_t2i.cot.models import EMBEDDED_MODEL, load_text_model
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE
from gcpo_t2i.demo.controls import MODEL, friendly
from gcpo_t2i.demo.runs import is_language_model, list_runs, run_folder
from gcpo_t2i.demo.studio import BOUNDS, Studio
from gcpo_t2i.errors import UserError

WHAT = """\
A language model answers a question several times. Blue: how much credit a token gets, because the question, and not a request
for a wrong answer, decided it. With the right answer also what an update would make likelier (green) and less likely
(purple)."""

MAX_QUESTION = 1000  # characters
MAX_TOKENS = 64
CONTRASTS = ("k3", "abs", "log_ratio")
NORMALIZERS = ("power_rank", "mean", "softmax")


class Reasoner:
    """The language model that was asked last; methods may be called from several threads at once."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._lock = Lock()
        self._loaded: tuple[Path | None, tuple[Any, Any]] | None = None

    def names(self) -> list[str]:
        """The shipped model, and runs that trained one."""
        runs = list_runs(self.studio.runs_dir)
        return [EMBEDDED_MODEL, *(name for name in runs if is_language_model(self._policy(name)))]

    def ask(self, name: str | None, config: CotHeatmapConfig) -> list[Explained]:
        """UserError for what the visitor can mend."""
        for kind, text in {"question": config.prompt, "negative prompt": config.negative_template}.items():
            if len(text) > MAX_QUESTION:
                raise UserError(f"a {kind} of {len(text):,} characters; {MAX_QUESTION:,} are the most")
        check_numbers(config, self.studio.config.max_images)
        validate(config)
        folder = None if name in (None, EMBEDDED_MODEL) else self._policy(name)
        if folder is not None and not is_language_model(folder):
            raise UserError(f"run '{name}' has no trained language model")
        with self._lock:
            return explained(config, *self._load(folder))

    def _policy(self, run: str | None) -> Path:
        return run_folder(self.studio.runs_dir, run) / "policy"

    def _load(self, folder: Path | None) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None  # lets go of the old one before there are two
            name = EMBEDDED_MODEL if folder is None else str(folder)
            self._loaded = folder, load_text_model(name, self.studio.device)
        return self._loaded[1]


def check_numbers(config: CotHeatmapConfig, most_answers: int) -> None:
    """UserError for numbers out of their bounds, which a page can be made to send."""
    bounds = {"num_answers": (1, most_answers), "temperature": BOUNDS["temperature"], "seed": BOUNDS["seed"]}
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise UserError(f"{name} must be a number from {low:g} to {high:g}, not {value}")


def reasoning_tab(studio: Studio) -> tuple[gr.Dropdown, Reasoner]:
    """Returns the list of models, which has to be kept up to date, and who knows them."""
    reasoner, default = Reasoner(studio), CotHeatmapConfig()
    gr.Markdown(WHAT)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            model = gr.Dropdown(reasoner.names(), value=EMBEDDED_MODEL, label="Model", elem_id="reasoning-model")
            question = gr.Textbox(default.prompt, label="Question", lines=3, max_lines=8, elem_id="reasoning-question")
            right = gr.Textbox(
                DEFAULT_ANSWER,
                label="Right answer",
                info="A number; or nothing, for credit alone",
                elem_id="reasoning-answer",
            )
            negative = gr.Textbox(
                WRONG_ON_PURPOSE,
                label="Negative prompt",
                info="{question} stands for the question; nothing: the empty prompt",
                lines=2,
                elem_id="reasoning-negative",
            )
            with gr.Accordion("Sampling and credit", open=False):
                group = gr.Slider(
                    1, studio.config.max_images, min(4, studio.config.max_images), step=1, label="Answers in the group"
                )
                temperature = gr.Slider(*BOUNDS["temperature"], value=1.0, step=0.1, label="Temperature")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="reasoning-seed")
                contrast = gr.Dropdown(list(CONTRASTS), value=CONTRASTS[0], label="Contrast")
                normalizer = gr.Dropdown(list(NORMALIZERS), value=NORMALIZERS[0], label="Normalizer")
            button = gr.Button("Answer", variant="primary", elem_id="reasoning-go")
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(elem_id="reasoning-answers")

    def ask(name: str | None, *boxes: Any) -> str:
        return drawn(reasoner.ask(name, order(*boxes)))

    boxes = [question, right, negative, group, temperature, seed, contrast, normalizer]
    button.click(friendly(ask), [model, *boxes], [shown], **MODEL)
    return model, reasoner


def order(
    question: str | None,
    right: str | None,
    negative: str | None,
    group: float,
    temperature: float,
    seed: float,
    contrast: str,
    normalizer: str,
) -> CotHeatmapConfig:
    """What the boxes say; nothing of it has been checked."""
    return CotHeatmapConfig(
        prompt=(question or "").strip(),
        answer=(right or "").strip() or None,
        negative_template=negative or "",
        num_answers=group if group is None else int(group),
        max_answer_tokens=MAX_TOKENS,
        temperature=temperature,
        seed=seed if seed is None else int(seed),
        credit=TextCreditConfig(contrast=contrast, normalizer=normalizer),
    )


def drawn(answers: list[Explained]) -> str:
    """The answers as they are on the page of `cot heatmap`."""
    parts = (
        f"{answer_html(number, one)}<p><small>most credit: {escape(most(one.tokens))}</small></p>"
        for number, one in enumerate(answers, start=1)
    )
    return "".join(parts)
