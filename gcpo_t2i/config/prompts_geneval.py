"""Settings of `gcpo-t2i prompts geneval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcpo_t2i.config.base import ConfigError, bounded, suggest

MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}


@dataclass
class PromptsGenevalConfig:
    """Training prompts made from GenEval's templates."""

    n: int = bounded(50_000, "> 0")
    """How many prompts."""
    out: str = "geneval_train.jsonl"
    """The file to write, in GenEval's own metadata format."""
    exclude: str | None = None
    """A .jsonl or .txt file with prompts that must not be among them, nor any that becomes one when its two objects change
    places: GenEval's evaluation_metadata.jsonl."""
    mix: dict[str, int] = field(default_factory=lambda: dict(MIX))
    """Shares of the tags, as {tag: share, ...}; a tag that is not named has none."""
    seed: int = bounded(0, ">= 0")
    """Same seed, same prompts."""
    overwrite: bool = False
    """Replace a file that is there."""

    def check(self) -> None:
        if not self.out.endswith(".jsonl"):
            raise ConfigError(
                "out", f"out '{self.out}' must end with .jsonl, by which it is read as prompts with metadata"
            )
        for tag, share in self.mix.items():
            if tag not in MIX:
                raise ConfigError("mix", f"mix: the tag '{tag}' is unknown{suggest(tag, MIX)}")
            if share < 0:
                raise ConfigError("mix", f"mix: the share of '{tag}' must be >= 0, not {share}")
        if not any(self.mix.values()):
            raise ConfigError("mix", "mix: at least one tag needs a share above 0")
