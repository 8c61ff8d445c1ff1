"""How large a saved policy is, from its config files and the headers of its weights: no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gcpo_t2i.config import LoraConfig, TrainConfig
from gcpo_t2i.models.folder import read_index, read_json, reading
from gcpo_t2i.models.trained import rate_of

PROMPT_TOKENS = 64  # a prompt of forty words, and the chat template around it


@dataclass(frozen=True)
class Sizes:
    """What memory and time depend on."""

    grid: tuple[int, int]  # (H, W) of the code map
    codes: int  # V
    caption_tokens: int  # L, the longest caption; PROMPT_TOKENS where a family has no limit
    dim: int  # width of the trunk
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    parameters: int  # all: trunk, head, text encoder, image tokenizer
    trainable: int  # those that reinforcement learning changes
    tensors: Mapping[str, int]  # name → parameters, of what the family trains
    float_parameters: int  # those that are float32 even if the rest is loaded in bfloat16
    image_elements: int  # of the largest feature map that the image decoder makes of one image

    @property
    def positions(self) -> int:
        """T, the codes of one image."""
        return self.grid[0] * self.grid[1]


def read_sizes(folder: str | Path) -> Sizes:
    """The sizes of the policy saved in `folder`. UserError as `load_policy`, for what can be seen without the weights."""
    return FAMILIES[read_index(folder, FAMILIES)["_class_name"]](Path(folder))


def with_adapters(sizes: Sizes, config: LoraConfig) -> Sizes:
    """The sizes with LoRA adapters, which are then all that is trained; as they are without a rank."""
    if config.rank is None:
        return sizes
    heads, kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    inputs_and_outputs = {
        "q_proj": sizes.dim + heads,
        "k_proj": sizes.dim + kv_heads,
        "v_proj": sizes.dim + kv_heads,
        "o_proj": heads + sizes.dim,
        "gate_proj": sizes.dim + sizes.mlp_dim,
        "up_proj": sizes.dim + sizes.mlp_dim,
        "down_proj": sizes.mlp_dim + sizes.dim,
    }
    names = {target.rpartition(".")[2] for target in config.targets}
    count = sizes.layers * config.rank * sum(inputs_and_outputs.get(name, 0) for name in names)
    return replace(sizes, parameters=sizes.parameters + count, trainable=count)


def to_train(sizes: Sizes, config: TrainConfig) -> Sizes:
    """The sizes of what a run trains: adapters, or the modules that it names."""
    return with_modules(sizes, config.optim.modules) if config.lora.rank is None else with_adapters(sizes, config.lora)


def with_modules(sizes: Sizes, modules: Mapping[str, float] | None) -> Sizes:
    """The sizes where only these modules are trained; as they are for null."""
    if modules is None:
        return sizes
    return replace(sizes, trainable=sum(count for name, count in sizes.tensors.items() if rate_of(name, modules)))


def _llamagen(path: Path) -> Sizes:
    adapter, trunk, vq = (read_json(path / part / "config.json") for part in ("adapter", "trunk", "vq"))
    counts = {part: _parameters(path / part) for part in ("trunk", "adapter", "text_encoder", "vq")}
    tensors = {f"trunk.{name}": count for name, count in counts["trunk"].items()} | {
        f"adapter.{name}": count for name, count in counts["adapter"].items() if name != "uncond_embedding"
    }
    with reading(path):
        (height, width), channels = adapter["grid"], vq["block_out_channels"]
        scale = 2 ** (len(channels) - 1)  # of pixels to codes; the decoder's last block gets the channels before it
        return Sizes(
            grid=(height, width),
            codes=adapter["codes"],
            caption_tokens=adapter["caption_tokens"],
            dim=trunk["hidden_size"],
            layers=trunk["num_hidden_layers"],
            heads=trunk["num_attention_heads"],
            kv_heads=trunk["num_key_value_heads"],
            head_dim=trunk.get("head_dim") or trunk["hidden_size"] // trunk["num_attention_heads"],
            mlp_dim=trunk["intermediate_size"],
            parameters=sum(sum(part.values()) for part in counts.values()),
            trainable=sum(tensors.values()),
            tensors=tensors,
            float_parameters=sum(counts["vq"].values()),
            image_elements=channels[min(1, len(channels) - 1)] * height * width * scale**2,
        )


def _janus(path: Path) -> Sizes:
    from transformers import JanusConfig

    counts = _parameters(path)
    tensors = {name: count for name, count in counts.items() if name.startswith("model.language_model.")}
    with reading(path):
        config: Any = JanusConfig.from_pretrained(path, local_files_only=True)
        text, vq = config.text_config, config.vq_config
        side, multipliers = vq.num_patches, vq.channel_multiplier
        scale = 2 ** (len(multipliers) - 1)
        channels = vq.base_channels * multipliers[min(1, len(multipliers) - 1)]
        return Sizes(
            grid=(side, side),
            codes=vq.num_embeddings,
            caption_tokens=PROMPT_TOKENS,
            dim=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            mlp_dim=text.intermediate_size,
            parameters=sum(counts.values()),
            trainable=sum(tensors.values()),
            tensors=tensors,
            float_parameters=sum(
                count for name, count in counts.items() if name.startswith(("model.vqmodel.", "model.generation_head."))
            ),
            image_elements=channels * (side * scale) ** 2,
        )


def _parameters(part: Path) -> dict[str, int]:
    """Tensor name → number of elements, of all the weight files of a part."""
    counts: dict[str, int] = {}
    with reading(part):
        for file in sorted(part.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as weights:
                counts |= {name: prod(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        if not counts:
            raise OSError("no .safetensors file")
    return counts


FAMILIES: dict[str, Callable[[Path], Sizes]] = {"JanusPolicy": _janus, "LlamaGenPolicy": _llamagen}
