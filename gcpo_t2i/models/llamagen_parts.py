"""The parts that a LlamaGen policy is put together from: made from sizes, written to a folder, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from gcpo_t2i.models import folder

INDEX = {
    "trunk": ("transformers", "LlamaModel"),
    "adapter": ("gcpo_t2i.models.llamagen", "Adapter"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "AutoTokenizer"),
    "vq": ("diffusers", "VQModel"),
}


class FloatLinear(nn.Linear):
    """A linear layer computed in float32 whatever runs around it: logits in bf16 keep 8 bits, and the log-probs of
    rollout and update would differ by hundredths."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float())


class Adapter(nn.Module):
    """What surrounds the trunk: caption projector (LlamaGen's `cap_proj`), null caption in text space, output head."""

    def __init__(self, text_dim: int, dim: int, codes: int, caption_tokens: int) -> None:
        super().__init__()
        self.caption_projector = nn.Sequential(
            nn.Linear(text_dim, dim, bias=False), nn.GELU(approximate="tanh"), nn.Linear(dim, dim, bias=False)
        )
        self.uncond_embedding = nn.Parameter(torch.randn(caption_tokens, text_dim) * text_dim**-0.5)
        self.head = FloatLinear(dim, codes, bias=False)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that make an adapter of the same shape."""
        first = self.caption_projector[0]
        assert isinstance(first, nn.Linear)
        return {
            "text_dim": first.in_features,
            "dim": first.out_features,
            "codes": self.head.out_features,
            "caption_tokens": self.uncond_embedding.shape[0],
        }


class Parts(NamedTuple):
    """In the order of LlamaGenPolicy's arguments."""

    trunk: LlamaModel
    adapter: Adapter
    text_encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerFast
    vq: VQModel

    def check(self) -> None:
        """ValueError when the parts are not of one policy."""
        adapter = self.adapter.sizes
        codes = {
            "trunk": self.trunk.config.vocab_size,
            "output head": adapter["codes"],
            "VQ codebook": self.vq.config["num_vq_embeddings"],
        }
        text = {"text encoder": self.text_encoder.config.d_model, "caption projector": adapter["text_dim"]}
        width = {"trunk": self.trunk.config.hidden_size, "adapter": adapter["dim"]}
        for what, sizes in (("codes", codes), ("text width", text), ("width", width)):
            if len(set(sizes.values())) > 1:
                raise ValueError(f"the parts disagree on {what}: {sizes}")


# ---- from sizes


def new_trunk(
    *,
    codes: int,
    positions: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp_dim: int,
    theta: float = 10000.0,
    prefix_cos: float = 1.0,
) -> LlamaModel:
    """Its token embedding is the image codes', so that it has no dead parameters. `prefix_cos`: see `rope.rotary_table`."""
    config = LlamaConfig(
        vocab_size=codes,
        hidden_size=dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rotary_prefix_cos=prefix_cos,  # pyright: ignore[reportCallIssue]  # ours: transformers keeps what it does not know
        initializer_range=initial_std(dim),
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaModel(config)


def new_adapter(text_dim: int, dim: int, codes: int, caption_tokens: int) -> Adapter:
    adapter = Adapter(text_dim, dim, codes, caption_tokens)
    for module in adapter.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=initial_std(dim))
    return adapter


def initial_std(dim: int) -> float:
    """LlamaGen's 0.02 at its width of about 1000, and not vanishing at small ones."""
    return 0.6 * dim**-0.5


def new_text_encoder(
    tokenizer: PreTrainedTokenizerFast, dim: int, layers: int, heads: int, mlp_dim: int
) -> T5EncoderModel:
    """T5 v1.1, without dropout."""
    padding: Any = tokenizer.pad_token_id
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=dim,
        d_kv=dim // heads,
        d_ff=mlp_dim,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=padding,
    )
    return T5EncoderModel(config)


# ---- folder


def save_parts(parts: Parts, grid: tuple[int, int], path: Path, class_name: str) -> None:
    """Writes model_index.json and one sub-folder per part, weights as safetensors."""
    (path / "adapter").mkdir(parents=True, exist_ok=True)
    with folder.no_progress_bars():
        parts.trunk.save_pretrained(path / "trunk")
        parts.text_encoder.save_pretrained(path / "text_encoder")
        parts.tokenizer.save_pretrained(path / "tokenizer")
        parts.vq.save_pretrained(path / "vq")
    vq_config = folder.read_json(path / "vq" / "config.json")
    vq_config.pop("_name_or_path", None)  # diffusers notes where it was loaded from: a path of the user's machine
    folder.write_json(path / "vq" / "config.json", vq_config)
    weights = {name: tensor.contiguous() for name, tensor in parts.adapter.state_dict().items()}
    save_file(weights, path / "adapter" / "model.safetensors", metadata={"format": "pt"})
    folder.write_json(path / "adapter" / "config.json", {"grid": grid, **parts.adapter.sizes})
    folder.write_index(path, class_name, INDEX)


def load_parts(path: Path, dtype: torch.dtype) -> tuple[Parts, tuple[int, int]]:
    """What `save_parts` wrote, and the grid. UserError names the part that is missing, damaged or of a wrong shape."""
    config = folder.read_json(path / "adapter" / "config.json")
    with folder.reading(path / "adapter"):
        height, width = config.pop("grid")
        adapter = Adapter(**config)
        adapter.load_state_dict(load_file(path / "adapter" / "model.safetensors"))
    with folder.no_progress_bars():
        trunk = _load(LlamaModel, path / "trunk", dtype=dtype)
        text_encoder = _load(T5EncoderModel, path / "text_encoder", dtype=dtype)
        vq = _load(VQModel, path / "vq", torch_dtype=torch.float32)
        with folder.reading(path / "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
    parts = Parts(trunk, adapter.to(dtype), text_encoder, tokenizer, vq)
    with folder.reading(path):
        parts.check()
    return parts, (int(height), int(width))


def _load(kind: Any, path: Path, **dtype: torch.dtype) -> Any:
    """A transformers or diffusers model from its own folder; the two name the dtype differently."""
    with folder.reading(path):
        model, info = kind.from_pretrained(path, local_files_only=True, output_loading_info=True, **dtype)
        folder.require_complete(path, info)
    return model
