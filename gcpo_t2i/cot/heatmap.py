"""`gcpo-t2i cot heatmap`: the tokens of answers, coloured by credit, in the terminal and as an HTML file."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from gcpo_t2i.config import ConfigError, CotHeatmapConfig
from gcpo_t2i.config.cot import DEFAULT_QUESTION
from gcpo_t2i.cot.explain import Explained, Token, explain, sample_answers
from gcpo_t2i.cot.models import check_words, load_text_model
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import write_text
from gcpo_t2i.run import resolve_device

DEFAULT_ANSWER = "25"  # of DEFAULT_QUESTION
FULL = 2.5  # credit that gets the full colour
MOST = 3  # tokens that are named

WHITE, BLUE, GREEN, PURPLE = (255, 255, 255), (70, 130, 220), (60, 160, 80), (150, 80, 190)

Colour = tuple[int, int, int]


def heatmap(config: CotHeatmapConfig) -> Path:
    """Draws the credit of the answers to `config.prompt` and returns the HTML file. UserError for what cannot be drawn."""
    out = Path(config.out)
    if out.is_dir():
        raise ConfigError("out", f"out '{out}' is a folder; name a file, such as {out / 'heatmap.html'}")
    if out.exists() and not config.overwrite:
        raise ConfigError("out", f"'{out}' is already there; add --overwrite to replace it, or name another --out")
    answers = explained(config, *load_text_model(config.model, resolve_device(config.device)))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"question  {config.prompt}", markup=False)
    console.print(f"negative  {shown_negative(config)}\n", markup=False)
    for number, one in enumerate(answers, start=1):
        console.print(f"{title(number, one)}", markup=False)
        console.print(coloured(one.tokens, credit_colour))
        if one.advantage:  # a group of equal rewards moves nothing
            console.print(coloured(one.tokens, signed_colour))
        console.print(f"most credit: {most(one.tokens)}\n", markup=False, style="dim")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(config, answers))
    return out


def explained(config: CotHeatmapConfig, model: Any, tokenizer: Any) -> list[Explained]:
    """The answers that `config` asks for, with their credit. UserError for words that the model does not know, and for a right
    answer that is no number."""
    model.eval()
    user = config.prompt_template.replace("{question}", config.prompt)
    for text in (user, config.text or ""):
        check_words(tokenizer, text, config.model)
    if config.text is None:
        how = config.num_answers, config.max_answer_tokens, config.temperature, config.seed
        ids = sample_answers(model, tokenizer, user, *how)
    else:
        ids = [[*tokenizer(config.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    if not all(ids):
        raise UserError("an answer without a token has no credit; give another --seed or --text")
    right = config.answer
    if right is None and config.prompt == DEFAULT_QUESTION:
        right = DEFAULT_ANSWER
    credit = config.credit.resolved("guidance")
    return explain(
        model, tokenizer, user, ids, config.negative_template, credit, config.temperature, right, config.seed
    )


def shown_negative(config: CotHeatmapConfig) -> str:
    return " ".join(config.negative_template.replace("{question}", "QUESTION").split()) or "(empty)"


def title(number: int, one: Explained) -> str:
    if one.reward is None:
        return f"answer {number}"
    verdict = "right" if one.reward else "wrong"
    return f"answer {number}: {verdict}" + ("" if one.advantage is None else f", advantage {one.advantage:+.2f}")


def most(tokens: Sequence[Token]) -> str:
    """The tokens with the most credit, in the order of their credit."""
    best = sorted((token for token in tokens if token.text.strip()), key=lambda token: -token.credit)[:MOST]
    return ", ".join(f"{token.text.strip()} {token.credit:.1f}" for token in best)


# --- colours --------------------------------------------------------------------------------------------------------


def blend(colour: Colour, share: float) -> Colour:
    """White for 0, the colour for 1 and beyond."""
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(w + (c - w) * share) for w, c in zip(WHITE, colour, strict=True))
    return red, green, blue


def credit_colour(token: Token) -> Colour:
    return blend(BLUE, token.credit / FULL)


def signed_colour(token: Token) -> Colour:
    """Green for what an update makes likelier, purple for what it makes less likely."""
    signed = token.signed or 0.0
    return blend(GREEN if signed > 0 else PURPLE, abs(signed) / FULL)


def coloured(tokens: Sequence[Token], colour: Callable[[Token], Colour]) -> Text:
    text = Text()
    for token in tokens:
        red, green, blue = colour(token)
        text.append(token.text, Style(color="black", bgcolor=f"rgb({red},{green},{blue})"))
    return text


# --- the page -------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.9 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111;
       background: #fff }
p.tokens { margin: 0.2rem 0 } span.token { padding: 0.15rem 0; border-radius: 2px; white-space: pre-wrap }
small, dt { color: #555 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem } dd { margin: 0 }
"""


def page(config: CotHeatmapConfig, answers: Sequence[Explained]) -> str:
    """A whole HTML page without scripts and without anything from elsewhere."""
    facts = {
        "question": config.prompt,
        "negative prompt": shown_negative(config),
        "model": config.model,
        "credit": f"{config.credit.rule or 'guidance'}, {config.credit.contrast}, {config.credit.normalizer}",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    parts = "".join(answer_html(number, one) for number, one in enumerate(answers, start=1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Token credit</title><style>{STYLE}</style>'
        f"<h1>Token credit</h1><dl>{listed}</dl>{parts}"
        "<small>Blue: share of the credit. Green and purple: credit × advantage, what an update makes likelier and less "
        "likely. Point at a token for its numbers.</small></html>\n"
    )


def answer_html(number: int, one: Explained) -> str:
    lines = [f"<h2>{html.escape(title(number, one))}</h2>", tokens_html(one.tokens, credit_colour)]
    if one.advantage:
        lines.append(tokens_html(one.tokens, signed_colour))
    return "".join(lines)


def tokens_html(tokens: Sequence[Token], colour: Callable[[Token], Colour]) -> str:
    spans = []
    for token in tokens:
        red, green, blue = colour(token)
        numbers = f"credit {token.credit:.2f}, log-ratio {token.gap:+.2f} nats"
        spans.append(
            f'<span class="token" style="color:#111;background:rgb({red},{green},{blue})" title="{numbers}">'
            f"{html.escape(token.text)}</span>"
        )
    return f'<p class="tokens">{"".join(spans)}</p>'
