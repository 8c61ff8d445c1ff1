"""The demo's tab Reasoning, without a browser."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcpo_t2i.config import DemoConfig
from gcpo_t2i.cot.heatmap import DEFAULT_ANSWER
from gcpo_t2i.demo.comparison import trained_runs
from gcpo_t2i.demo.reasoning import MAX_QUESTION, Reasoner, drawn, order
from gcpo_t2i.errors import UserError
from tests.tiny_text import tiny_text_model

BOXES: dict[str, Any] = {
    "question": "Ann has nine marbles. She doubles them. How many marbles does Ann have?",
    "right": "18",
    "negative": "{question} Give a wrong answer on purpose.",
    "group": 3,
    "temperature": 1.0,
    "seed": 0,
    "contrast": "k3",
    "normalizer": "power_rank",
}


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    """Two runs: one of a language model of random weights, and one of something else."""
    root: Path = tmp_path_factory.mktemp("runs")
    for name in ("text", "image"):
        (root / name / "policy").mkdir(parents=True)
        (root / name / "metrics.jsonl").touch()
    model, tokenizer = tiny_text_model()
    model.save_pretrained(root / "text" / "policy")
    tokenizer.save_pretrained(root / "text" / "policy")
    studio: Any = SimpleNamespace(
        runs_dir=root, device=torch.device("cpu"), config=DemoConfig(runs_dir=str(root), max_images=6)
    )
    return Reasoner(studio)


def test_runs_are_where_they_can_be_used(reasoner: Reasoner) -> None:
    assert reasoner.names() == ["arithmetic", "text"]
    assert trained_runs(reasoner.studio) == ["image"]


def test_answers_of_the_shipped_model_are_those_of_the_command(reasoner: Reasoner) -> None:
    answers = reasoner.ask("arithmetic", order(**BOXES))
    assert len(answers) == 3 and answers == reasoner.ask(None, order(**BOXES))
    made = drawn(answers)
    assert made.count("<h2>") == 3 and "answer 1: " in made and "most credit: " in made
    assert all(one.reward in (0.0, 1.0) for one in answers)


def test_a_run_answers_and_the_model_is_changed(reasoner: Reasoner) -> None:
    first = [one.text for one in reasoner.ask("text", order(**BOXES))]
    assert first != [one.text for one in reasoner.ask("arithmetic", order(**BOXES))]


def test_without_a_right_answer_there_is_credit_alone(reasoner: Reasoner) -> None:
    answers = reasoner.ask("text", order(**{**BOXES, "right": " "}))
    assert all(one.reward is None for one in answers)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({"question": ""}, "the prompt is empty"),
        ({"question": "word " * MAX_QUESTION}, "a question of 4,999 characters; 1,000 are the most"),
        ({"negative": "Wrong."}, r"has no \{question\}"),
        ({"right": "many"}, "cannot be read as a number"),
        ({"question": "Zoe has two cats."}, "does not know: Zoe, cats"),
        ({"group": 7}, "num_answers must be a number from 1 to 6, not 7"),
        ({"seed": None}, "seed must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"contrast": "exact_kl"}, "needs exact_kl, which texts do not have"),
    ],
)
def test_what_visitors_can_mend(reasoner: Reasoner, boxes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reasoner.ask("text", order(**{**BOXES, **boxes}))


@pytest.mark.parametrize("run", ["image", "../text", "none"])
def test_runs_that_cannot_answer(reasoner: Reasoner, run: str) -> None:
    with pytest.raises(UserError):
        reasoner.ask(run, order(**BOXES))


def test_the_default_question_comes_with_its_answer() -> None:
    assert order(**{**BOXES, "right": DEFAULT_ANSWER}).answer == "25"
