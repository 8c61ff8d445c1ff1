"""The shipped language model does what its card says, and `cot train` runs on it without any option but its size."""

from __future__ import annotations

import json

import pytest
import torch

from gcpo_t2i.cli import main
from gcpo_t2i.config import CotEvalConfig
from gcpo_t2i.cot.answers import answer_reward
from gcpo_t2i.cot.evaluation import Evaluation, evaluate
from gcpo_t2i.cot.models import REASONER, load_text_model
from gcpo_t2i.cot.negatives import QUESTION, WRONG_ON_PURPOSE
from gcpo_t2i.cot.questions import load_questions

CARD = json.loads((REASONER / "scores.json").read_text())["scores"]


@pytest.mark.parametrize(("column", "template"), [("question", QUESTION), ("wrong on purpose", WRONG_ON_PURPOSE)])
def test_accuracy_is_that_of_the_card(column: str, template: str) -> None:
    """The same questions and seed as for the card; another version of torch may draw other answers within its interval."""
    model, tokenizer = load_text_model("arithmetic", torch.device("cpu"))
    questions = load_questions("arithmetic:heldout", 400)
    found = evaluate(model, tokenizer, questions, answer_reward, CotEvalConfig(), template, 48)
    assert found.mean == pytest.approx(CARD[column]["temperature 1"], abs=CARD[column]["temperature 1_ci95"])


def test_there_is_something_to_fix_and_the_model_is_small() -> None:
    assert 0.4 <= CARD["question"]["temperature 1"] <= 0.6 and 0.4 <= CARD["question"]["likeliest tokens"] <= 0.6
    assert (REASONER / "model.safetensors").stat().st_size < 4 * 10**6


def test_the_interval_is_over_questions() -> None:
    """Two answers to each of two questions: means 1 and 1/2, whose std is √(1/8), over √2, times 1.96."""
    found = Evaluation([{"question": "a"}, {"question": "b"}], [""] * 4, [1.0, 1.0, 1.0, 0.0])
    assert found.mean == 0.75 and found.ci95 == pytest.approx(1.96 * (1 / 8) ** 0.5 / 2**0.5)


def test_the_main_job_without_any_option_but_its_size(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cot", "train", "--steps", "1", "--eval.num_questions", "20", "--device", "cpu"]) == 0
    assert "held-out accuracy after step 1" in capsys.readouterr().out
    assert (tmp_path / "runs" / "cot_guidance_gcpo-1" / "policy" / "README.md").is_file()
