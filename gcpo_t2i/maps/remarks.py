"""What a person should know before believing a map, in sentences."""

from __future__ import annotations

from textwrap import shorten

from gcpo_t2i.data import Prompt
from gcpo_t2i.maps.scored import ScoredImages
from gcpo_t2i.models.policy import Policy

NAMED = 8  # unknown words that are named


def of_prompt(policy: Policy, prompt: Prompt) -> list[str]:
    """Words of the prompt and of the negative prompt that the model does not know, and what it does not read."""
    remarks = []
    for kind, text in {"prompt": prompt.text, "negative prompt": prompt.negative or ""}.items():
        reading = policy.read(text)
        if reading.unknown:
            words = ", ".join(f"'{shorten(word, 40)}'" for word in reading.unknown[:NAMED])
            more = f" and {len(reading.unknown) - NAMED} more" if len(reading.unknown) > NAMED else ""
            remarks.append(
                f"the model does not know these words of the {kind}, to it they are all the same: {words}{more}"
            )
        if reading.cut:
            remarks.append(
                f"the {kind} is too long for the model, which does not read the last {len(reading.cut):,} characters, from "
                f"'{shorten(reading.cut, 60, placeholder=' …')}' on"
            )
    return remarks


def of_group(scored: ScoredImages) -> list[str]:
    """Rewards that say nothing, and maps that would mean nothing."""
    remarks = []
    silent = [name for name, values in scored.scores.items() if all(value is None for value in values)]
    if 0 < len(silent) < len(scored.scores):
        remarks.append(f"{', '.join(silent)}: cannot judge this prompt, and does not count")
    if scored.no_advantage:
        remarks.append(f"no advantage map: {scored.no_advantage}")
    if scored.unmoved.all():
        same = (
            "is the prompt"
            if scored.prompt.negative == scored.prompt.text
            else "predicts every code as the prompt does"
        )
        other = "the negative prompt" if scored.prompt.negative is not None else "no prompt at all"
        remarks.append(
            f"no credit map: {other} {same}, so that there is no evidence for any code, and all get the same credit"
        )
    return remarks
