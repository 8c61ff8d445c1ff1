"""Aesthetic score: a small head on L2-normalised CLIP image features, on LAION's scale (about 1 to 10).

After LAION's aesthetic predictor (github.com/LAION-AI/aesthetic-predictor: one linear layer) and its successor
(github.com/christophschuhmann/improved-aesthetic-predictor: a multi-layer perceptron), whose published head
`sac+logos+ava1-l14-linearMSE.pth` is read as it is. Our own heads are safetensors + json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gcpo_t2i.shapes import checkpoint_path
from rewards.clip import Images, default_device, encoder
from rewards.errors import RewardError

LAION_CLIP = ("ViT-L-14", "openai")


class AestheticHead(nn.Module):
    """(N, dim) L2-normalised features → (N,) scores. `hidden`: width of the one hidden layer, 0 for a linear head."""

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.layers = nn.Linear(dim, 1)
        if hidden:
            self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps({"dim": self.dim, "hidden": self.hidden}, indent=2)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AestheticHead:
        """Raises RewardError if the folder does not hold such a head."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            head = cls(config["dim"], config["hidden"])
            head.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise RewardError(f"no aesthetic head in {folder}: {type(error).__name__}: {error}") from error
        return head


class LaionHead(nn.Module):
    """LAION's second predictor: (N, 768) → 1024 → 128 → 64 → 16 → (N,) with no non-linearity in between.

    The names of the layers are those of the published file, in which dropout layers take a number each.
    """

    dim = 768
    widths = (1024, 128, 64, 16, 1)
    numbers = (0, 2, 4, 6, 7)

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((self.dim, *self.widths[:-1]), self.widths, strict=True)
        layers = {str(number): nn.Linear(*size) for number, size in zip(self.numbers, sizes, strict=True)}
        self.layers = nn.ModuleDict(layers)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)

    @classmethod
    def from_file(cls, path: Path) -> LaionHead:
        """Raises RewardError for a file that holds anything but the ten tensors of such a head."""
        head = cls()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            head.load_state_dict(state)
        except (OSError, RuntimeError, UnpicklingError, EOFError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RewardError(
                f"{path} is no aesthetic head of LAION's (an MLP of 768-1024-128-64-16-1): {reason}"
            ) from error
        return head


class Aesthetic:
    """The head's score of each image; prompts play no part.

    head: folder of an `AestheticHead`, or LAION's file (.pth); by default the head that ships with the package.
    model, pretrained: the CLIP model it was trained on; by default ViT-L-14 of OpenAI for LAION's file, else the shipped one.
    """

    takes_pixels: ClassVar = True

    def __init__(
        self,
        head: str | Path | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        device = device or default_device()
        path = Path(head or checkpoint_path("aesthetic")).expanduser()
        laion = path.suffix in (".pth", ".pt")
        self.head = (LaionHead.from_file if laion else AestheticHead.from_pretrained)(path).to(device).eval()
        if model is None:
            model, pretrained = (LAION_CLIP[0], pretrained or LAION_CLIP[1]) if laion else ("shapesworld", pretrained)
        self.encoder = encoder(model, pretrained, device, batch_size)
        if self.encoder.dim != self.head.dim:
            raise RewardError(
                f"the aesthetic head reads features of width {self.head.dim}, CLIP model {model!r} gives "
                f"{self.encoder.dim}: name the model that the head was trained on"
            )

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str]) -> list[float]:
        return self.head(self.encoder.encode_images(images)).tolist() if len(images) else []
