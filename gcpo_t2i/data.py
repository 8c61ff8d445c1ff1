"""Prompts: where they come from, and in which order training sees them.

Four sources, all through `load_prompts`:

- `shapesworld:train` and `shapesworld:heldout`: the built-in prompts with their GenEval metadata;
- `FILE.txt`: one prompt per line;
- `FILE.jsonl`: one object per line with `prompt`, optionally `negative`, and whatever columns the rewards use.
  GenEval's own `evaluation_metadata.jsonl` loads as it is;
- `hf:NAME[:SPLIT[:COLUMN]]`: a data set of the Hugging Face hub, or a local folder of one.

`PromptSampler` has no state: what step 17 sees follows from the seed and from 17, so resuming needs nothing saved.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gcpo_t2i.datasets_prompts import DATASET, read_rows
from gcpo_t2i.errors import UserError, did_you_mean

BUILT_IN = ("shapesworld:train", "shapesworld:heldout")
MAX_PROMPT = 10_000  # characters; text encoders read some hundred tokens
RESERVED_COLUMNS = ("images", "prompts")  # the first two parameters of every reward function


@dataclass(frozen=True)
class Prompt:
    """One line of the training data."""

    text: str
    negative: str | None = None  # what guidance and credit contrast with; None = the model's own null prompt
    columns: Mapping[str, Any] = field(
        default_factory=dict
    )  # for the rewards, by name (GenEval: tag, include, exclude)
    place: str = field(default="", compare=False, repr=False)  # where it stands: "prompts.jsonl, line 3"


def load_prompts(source: str) -> list[Prompt]:
    """Prompts of a built-in set, of a .txt or .jsonl file, or of a data set (`hf:`), in their order; never empty.

    Raises UserError, which names the file and the line: unknown set, missing or empty file, unsupported suffix, text
    that is not UTF-8 (with the byte's offset), a line that is not JSON, is not an object, or has no usable "prompt".
    """
    if source in BUILT_IN:
        return _built_in(source)
    if source.startswith(DATASET):
        return [_from_object(row, f"{source}, row {number}") for number, row in enumerate(read_rows(source), start=1)]
    path = Path(source)
    if source.startswith("shapesworld") and not path.exists():
        raise UserError(f"prompts '{source}' are unknown{did_you_mean(source, BUILT_IN)}")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"prompts '{source}': expected a .txt or .jsonl file, hf:DATASET, or one of {', '.join(BUILT_IN)}; "
            f"the suffix '{path.suffix}' is not supported"
        )
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise UserError(f"prompt file '{path}' is empty; write one prompt per line")
    if suffix == ".txt":
        return [_from_object({"prompt": line}, f"{path}, line {number}") for number, line in lines]
    return [_from_json(line, f"{path}, line {number}") for number, line in lines]


def described(text: str, negative: str | None = None) -> Prompt:
    """The prompt, with GenEval's columns if it is in ShapesWorld's words, so that `geneval` can judge its images.

    UserError for an empty prompt, and for more than MAX_PROMPT characters.
    """
    from gcpo_t2i.shapes.prompts import parse_prompt  # here, as in `_built_in`

    if not text.strip():
        raise UserError("the prompt is empty; write what the image should show, such as 'a photo of a red circle'")
    for kind, own in {"prompt": text, "negative prompt": negative or ""}.items():
        if len(own) > MAX_PROMPT:
            raise UserError(
                f"a {kind} of {len(own):,} characters, starting with '{own[:40]}'; {MAX_PROMPT:,} are the most"
            )
    return Prompt(text, negative, parse_prompt(text) or {})


def repeated(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt that stands there a second time, with the same negative prompt and columns."""
    seen, again = set(), []
    for prompt in prompts:
        key = json.dumps([prompt.text, prompt.negative, dict(prompt.columns)], sort_keys=True)
        if key in seen:
            again.append(prompt)
        seen.add(key)
    return again


def notes_on(source: str, prompts: Sequence[Prompt]) -> list[str]:
    """What the user should know of prompts that were loaded from `source`."""
    if again := repeated(prompts):
        return [
            f"{source}: {len(again)} of {len(prompts)} prompts repeat others, such as '{again[0].text}'; they come as often"
        ]
    return []


def collate_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every column of any of the prompts as a list aligned with them; None where a prompt lacks it."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


class PromptSampler:
    """An endless, reproducible order over prompts, addressed by position.

    Prompts with a `tag` column take turns by tag: position i belongs to tag i mod K (K tags, in order of first appearance), so
    any K prompts in a row hold every tag once, however few prompts a tag has (ShapesWorld: 6 single_object, 2352 color_attr).
    With a `mix` (tag → whole number) a tag takes that many turns in each round; what is 0 or not named is left out. Within a
    tag every epoch is a new shuffle of all its prompts, drawn from (seed, tag, epoch). Without tags K = 1.

    Raises UserError for a mix that names a tag that no prompt has, or leaves none.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, mix: Mapping[str, int] | None = None) -> None:
        if not prompts:
            raise ValueError("a PromptSampler needs at least one prompt")
        groups: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            groups.setdefault(str(prompt.columns.get("tag", "")), []).append(prompt)
        if mix is not None and (mix.keys() - groups.keys() or not any(mix.values()) or min(mix.values()) < 0):
            raise UserError(
                f"train_mix {dict(mix)} must give numbers >= 0 to tags of the prompts, and not only zeros; "
                f"their tags: {', '.join(tag or '(none)' for tag in groups)}"
            )
        self.groups = list(groups.values())
        shares = [1 if mix is None else mix.get(tag, 0) for tag in groups]
        # turn by turn, so that a round alternates: 2 : 1 gives a b a
        self.round = [group for turn in range(max(shares)) for group, share in enumerate(shares) if turn < share]
        self.seed = seed

    def at(self, position: int) -> Prompt:
        """The prompt at a position ≥ 0 of the endless order."""
        rounds, turn = divmod(position, len(self.round))
        group = self.round[turn]
        drawn = rounds * self.round.count(group) + self.round[:turn].count(group)
        members = self.groups[group]
        epoch, index = divmod(drawn, len(members))
        return members[_shuffled(len(members), f"{self.seed}/{group}/{epoch}")[index]]

    def batch(self, start: int, n: int) -> list[Prompt]:
        """Positions start … start + n − 1. Step s (from 0) of a run with n prompts per step is `batch(s * n, n)`."""
        return [self.at(position) for position in range(start, start + n)]


@lru_cache(maxsize=64)
def _shuffled(n: int, seed: str) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _built_in(source: str) -> list[Prompt]:
    from gcpo_t2i.shapes import prompts as shapes  # here, because it imports numpy and most sources do not need it

    specs = shapes.train_specs() if source == "shapesworld:train" else shapes.heldout_specs()
    return [_from_object(spec, source) for spec in specs]


def read_text(path: Path, kind: str = "prompt file") -> str:
    """The file as text with \\n line ends. U+2028 and its like stay inside their line, as JSON allows."""
    if path.is_dir():
        raise UserError(f"{kind} '{path}' is a folder; give a .txt or .jsonl file")
    if not path.exists():
        raise UserError(f"{kind} '{path}' does not exist")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{kind} '{path}' cannot be read: {error.strerror}") from error
    bom = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[bom:].decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        offset = error.start + bom
        line = data.count(b"\n", 0, offset) + 1
        where = f"byte 0x{data[offset]:02x} at offset {offset} (line {line})"
        raise UserError(f"{kind} '{path}' is not UTF-8: {where}; save it as UTF-8") from error


def _from_json(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise UserError(f'{where}: expected an object such as {{"prompt": "a red circle"}}, got {line[:40]}')
    return _from_object(value, where)


def _from_object(value: Mapping[str, Any], where: str) -> Prompt:
    columns = dict(value)
    if "prompt" not in columns:
        raise UserError(f'{where}: no "prompt" among its keys ({", ".join(columns) or "none"})')
    text, negative = columns.pop("prompt"), columns.pop("negative", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "prompt" must be a text that is not empty, got {text!r}')
    if len(text) > MAX_PROMPT:
        raise UserError(
            f"{where}: a prompt of {len(text):,} characters, starting with '{text[:40]}'; {MAX_PROMPT:,} are the most, "
            "and a file holds one prompt per line"
        )
    if negative is not None and not isinstance(negative, str):
        raise UserError(f'{where}: "negative" must be a text or null, got {negative!r}')
    for name in RESERVED_COLUMNS:
        if name in columns:
            raise UserError(f'{where}: rename the column "{name}", rewards use that name for their own input')
    return Prompt(text, negative, columns, where)
