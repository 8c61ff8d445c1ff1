"""Token credit of answers: whose it is, how it is drawn, and what is escaped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gcpo_t2i.algo.credit import CreditSettings, guidance_credit
from gcpo_t2i.cli import main
from gcpo_t2i.config import CotHeatmapConfig
from gcpo_t2i.config.cot import DEFAULT_QUESTION
from gcpo_t2i.cot.answers import is_right, right_number
from gcpo_t2i.cot.explain import Explained, Token, explain, token_texts
from gcpo_t2i.cot.heatmap import (
    BLUE,
    DEFAULT_ANSWER,
    FULL,
    GREEN,
    PURPLE,
    WHITE,
    blend,
    credit_colour,
    most,
    page,
    signed_colour,
    title,
)
from gcpo_t2i.cot.models import answer, prompt_ids, score_answers
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE
from gcpo_t2i.cot.text_credit import TextCredit
from tests.tiny_text import tiny_text_model

USER = "Ann has two pens. She buys three more."


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = tiny_text_model()
    return model.eval(), tokenizer


def one_by_one(model, tokenizer, user: str, ids: list[int], temperature: float) -> tuple[list[float], list[float]]:
    """log π and entropy of each token, by a forward pass for each."""
    seen, logps, entropies = prompt_ids(tokenizer, [user])[0], [], []
    for token in ids:
        with torch.no_grad():
            logp = (model(torch.tensor([seen])).logits[0, -1].float() / temperature).log_softmax(-1)
        logps.append(logp[token].item())
        entropies.append(-(logp.exp() * logp).sum().item())
        seen = [*seen, token]
    return logps, entropies


def test_scores_are_those_of_single_tokens_whatever_the_padding(tiny):
    model, tokenizer = tiny
    answers = [tokenizer("two plus three is five.")["input_ids"], tokenizer("five")["input_ids"]]
    logp, entropy = score_answers(model, tokenizer, USER, answers, temperature=0.7)
    for row, ids in enumerate(answers):
        expected = one_by_one(model, tokenizer, USER, ids, 0.7)
        torch.testing.assert_close(logp[row, : len(ids)], torch.tensor(expected[0]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropy[row, : len(ids)], torch.tensor(expected[1]), rtol=1e-4, atol=1e-4)
        assert (logp[row, len(ids) :] == 0).all()


def test_the_likeliest_answer_is_made_of_the_likeliest_tokens_and_batches_do_not_matter(tiny):
    model, tokenizer = tiny
    users = [USER, "Eva has four coins."]
    how = {"tokens": 6, "temperature": 0.0, "seed": 0}
    together = answer(model, tokenizer, users, batch_size=2, **how)
    assert together == answer(model, tokenizer, users, batch_size=1, **how)
    seen = prompt_ids(tokenizer, [USER])[0]
    for token in together[0]:
        assert token == model(torch.tensor([seen])).logits[0, -1].argmax().item()
        seen = [*seen, token]


def test_sampling_follows_from_the_seed_and_leaves_the_global_one_alone(tiny):
    model, tokenizer = tiny
    how = {"tokens": 6, "temperature": 1.0, "batch_size": 8}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = answer(model, tokenizer, [USER] * 8, seed=1, **how)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == answer(model, tokenizer, [USER] * 8, seed=1, **how)
    assert first != answer(model, tokenizer, [USER] * 8, seed=2, **how)


def test_credit_is_that_of_the_image_side_and_signed_credit_its_product_with_the_advantage(tiny):
    """Two answers, one right: advantages ±1/2 over the unbiased std √½ plus 1e-4."""
    model, tokenizer = tiny
    answers = [tokenizer(text)["input_ids"] for text in ("two plus three is five. answer: 5", "answer: 6")]
    found = explain(model, tokenizer, USER, answers, WRONG_ON_PURPOSE, TextCredit(), 1.0, right="5")
    assert [one.reward for one in found] == [1.0, 0.0]
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    assert [one.advantage for one in found] == pytest.approx([advantage, -advantage])
    negative = f"{USER} Give a wrong answer on purpose."
    cond, null = (one_by_one(model, tokenizer, user, answers[0], 1.0)[0] for user in (USER, negative))
    tensors = {"cond_logp": torch.tensor([cond]), "null_logp": torch.tensor([null])}
    expected = guidance_credit(tensors, torch.ones(1, len(cond), dtype=torch.bool), CreditSettings(), [])[0]
    assert [token.credit for token in found[0].tokens] == pytest.approx(expected.tolist(), rel=1e-4)
    assert [token.signed for token in found[0].tokens] == pytest.approx((expected * advantage).tolist(), rel=1e-4)
    assert found[0].text == "two plus three is five. answer: 5"


def test_without_a_right_answer_there_is_no_advantage(tiny):
    model, tokenizer = tiny
    ids = [tokenizer("answer: 5")["input_ids"]]
    (found,) = explain(model, tokenizer, USER, ids, "", TextCredit(), 1.0, right=None)
    assert found.reward is None and found.advantage is None and found.tokens[0].signed is None
    (found,) = explain(model, tokenizer, USER, ids, "", TextCredit(), 1.0, right="5")
    assert found.reward == 1.0 and found.advantage is None  # a group of one


def test_pieces_of_a_text_make_the_whole(tiny):
    _, tokenizer = tiny
    ids = [*tokenizer("two plus three is five. answer: 5")["input_ids"], tokenizer.eos_token_id]
    pieces = token_texts(tokenizer, ids)
    assert pieces == ["two", " plus", " three", " is", " five", ".", " answer", ":", " 5", ""]


def test_colours():
    assert blend(BLUE, 0) == WHITE and blend(BLUE, 1) == BLUE == blend(BLUE, 7)
    assert blend((255, 155, 55), 0.5) == (255, 205, 155)
    assert credit_colour(Token("a", FULL, 0.0, None)) == BLUE
    assert signed_colour(Token("a", 1.0, 0.0, FULL)) == GREEN and signed_colour(Token("a", 1.0, 0.0, -FULL)) == PURPLE
    assert signed_colour(Token("a", 1.0, 0.0, 0.0)) == WHITE


def test_words():
    tokens = [Token("a", 0.5, 0, None), Token(" b", 2.0, 0, None), Token("", 9.0, 0, None), Token(" c", 1.0, 0, None)]
    assert most(tokens) == "b 2.0, c 1.0, a 0.5"  # the end has no words
    assert title(1, Explained(tokens, 1.0, 0.5)) == "answer 1: right, advantage +0.50"
    assert title(2, Explained(tokens, None, None)) == "answer 2"


def test_the_page_escapes_what_others_wrote():
    evil = "<script>alert(1)</script>"
    config = CotHeatmapConfig(prompt=evil, negative_template=f"{{question}} {evil}", model=evil)
    made = page(config, [Explained([Token(evil, 1.0, 0.0, None)], None, None)])
    assert "<script" not in made and made.count("&lt;script&gt;") == 4
    assert "http" not in made  # nothing from elsewhere


def test_the_default_question_has_the_default_answer():
    """9 + 5 = 14, doubled 28, minus 3 = 25; read as plus two it is 16 - 3 = 13."""
    assert "nine" in DEFAULT_QUESTION and right_number(DEFAULT_ANSWER) == 25
    assert not is_right("answer: 13", right_number(DEFAULT_ANSWER))


def test_the_command_writes_a_page_and_says_the_same(tiny, tmp_path: Path, capsys):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "page.html"
    text = ["--text", "two plus three is five. answer: 5", "--answer", "5"]
    ask = ["cot", "heatmap", "--model", str(tmp_path / "model"), "--prompt", USER, "--out", str(out), *text]
    assert main(ask) == 0
    said, made = capsys.readouterr().out, out.read_text()
    assert "answer 1: right" in said and "two plus three is five. answer: 5" in said
    spans = re.findall(r'<span class="token" style="color:#111;background:rgb\([\d,]+\)" title="credit ([\d.]+),', made)
    assert len(spans) == 10
    assert sum(map(float, spans)) / 10 == pytest.approx(1.0, abs=0.01)
    assert main(ask) == 2 and "is already there; add --overwrite" in capsys.readouterr().err
    assert main([*ask, "--overwrite"]) == 0
