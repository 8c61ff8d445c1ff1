"""Settings of `gcpo-t2i convert`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded

IMAGE_SIZES = {256, 384, 512}  # that LlamaGen is trained at


@dataclass
class ConvertLlamaGenConfig:
    """A published LlamaGen checkpoint, as a policy folder."""

    gpt: str | None = None
    """The transformer: a .pt file such as t2i_XL_stage1_256.pt."""
    vq: str | None = None
    """The image tokenizer: a .pt file such as vq_ds16_t2i.pt."""
    text_encoder: str = "google/flan-t5-xl"
    """The T5 that reads captions: an id of the Hugging Face Hub, or a folder."""
    out: str | None = None
    """The policy folder to write."""
    size: Literal["B", "L", "XL", "XXL", "3B"] | None = None
    """Size of the transformer, to be checked against the file; null = what the file says."""
    image_size: int | None = bounded(None, "> 0")
    """Width and height of the images in pixels, which is not in the file; null = the number in its name."""
    overwrite: bool = False
    """Replace the policy in out."""

    def check(self) -> None:
        for name, example in (("gpt", "t2i_XL_stage1_256.pt"), ("vq", "vq_ds16_t2i.pt"), ("out", "models/llamagen")):
            if getattr(self, name) is None:
                raise ConfigError(name, f"{name} is missing; give --{name}, such as --{name} {example}")
        if self.image_size is None and self.pixels() is None:
            raise ConfigError(
                "image_size",
                f"the name of {self.gpt} does not tell the size of its images; add --image_size 256 or 512",
            )

    def pixels(self) -> int | None:
        """`image_size`, or the one of the published sizes that the name of the file has, as t2i_XL_stage1_256.pt."""
        numbers = {int(number) for number in re.findall(r"\d+", Path(str(self.gpt)).stem)}
        named = numbers & IMAGE_SIZES
        return self.image_size or (named.pop() if len(named) == 1 else None)
