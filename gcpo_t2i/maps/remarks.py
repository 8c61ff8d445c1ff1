"""What a person should know before believing a map, in sentences."""

from __future__ import annotations

from gcpo_t2i.data import Prompt
from gcpo_t2i.maps.scored import ScoredImages
from gcpo_t2i.models.policy import Policy

NAMED = 8  # unknown words that are named


def brief(text: str, most: int) -> str:
    """At most so many characters of a text, on one line."""
    line = " ".join(text[: most + 1].split())
    return line if len(text) <= most else f"{line[:most]}…"


def of_prompt(policy: Policy, prompt: Prompt) -> list[str]:
    """Words of the prompt and of the negative prompt that the model does not know, and what it does not read."""
    remarks = []
    for kind, text in {"prompt": prompt.text, "negative prompt": prompt.negative or ""}.items():
        reading = policy.read(text)
        if reading.unknown:
            words = ", ".join(f"'{brief(word, 40)}'" for word in reading.unknown[:NAMED])
            more = f" and {len(reading.unknown) - NAMED} more" if len(reading.unknown) > NAMED else ""
            remarks.append(
                f"the model does not know these words of the {kind}, to it they are all the same: {words}{more}"
            )
        if reading.cut:
            remarks.append(
                f"the {kind} is too long for the model, which does not read the last {len(reading.cut):,} characters, from "
                f"'{brief(reading.cut, 60)}' on"
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
    return remarks + of_evidence(scored)


def of_evidence(scored: ScoredImages) -> list[str]:
    """Why there is no credit map, if so."""
    if not scored.unmoved.all():
        return []
    negative = scored.prompt.negative
    other = "the empty prompt" if negative is None else "the negative prompt"
    same = "is the prompt itself" if negative == scored.prompt.text else "predicts every code just as the prompt does"
    return [f"no credit map: {other} {same}, so there is no evidence for any code, and all get the same credit"]
