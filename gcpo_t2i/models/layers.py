"""The trunk's layers as the decoding engine runs them: fewer and faster linear layers, copied for one rollout.

Adapters that PEFT put beside linear layers stay apart from the weights, which in bfloat16 could not hold their small
differences, and are one more product of two small matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcpo_t2i.models.cache import working_dtype

Head = Callable[[Tensor], Tensor]
Adder = Callable[[Tensor, Tensor], Tensor]  # (residual (R, D), x) → the residual and a layer of x

COPY_BYTES = 1 << 32  # of weights that are copied on a CPU where a copy saves time only


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the trunk."""

    qkv: Head  # residual (R, D) → (R, (heads + 2 kv heads) * d), norm included
    out: Adder
    gate_up: Head  # residual (R, D) → (R, 2 * MLP width), norm included
    down: Adder
    activation: Head
    scale: float


def engine_layers(trunk: Any) -> list[Layer]:
    """The trunk's layers for a rollout: their weights as they are now, in the precision that autocast asks for."""
    copied = copies(trunk)

    def layer(module: Any) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        return Layer(
            qkv=normed(module.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], copied),
            out=added(attention.o_proj, copied),
            gate_up=normed(module.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], copied),
            down=added(mlp.down_proj, copied),
            activation=mlp.act_fn,
            scale=attention.scaling,
        )

    return [layer(module) for module in trunk.layers]


def is_lean(weight: Tensor) -> bool:
    """Whether small kernels are what takes the time, and sums may be rounded once less often than the trunk does: float32 on a
    CPU. On CUDA a step is captured, and in bfloat16 a rollout is to round as the passes of an update do."""
    return weight.device.type == "cpu" and working_dtype(weight) == torch.float32


def rms_norm(norm: Any, weighted: bool = True) -> Head:
    """LlamaRMSNorm in one kernel, and where `is_lean`, because torch takes eleven on a CPU, in four; in three without the last,
    the product with `norm_weight`, where not `weighted`."""
    weight, epsilon = norm.weight, norm.variance_epsilon
    if not is_lean(weight):
        return lambda x: F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    least, own = weight.new_full((1, 1), math.sqrt(epsilon * len(weight))), norm_weight(norm)

    def normalized(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least)

    return (lambda x: normalized(x) * own) if weighted else normalized


def norm_weight(norm: Any) -> Tensor:
    """(D,) What is left to multiply with after a division by length: x / √(‖x‖²/D + ε) is √D x / √(‖x‖² + D ε)."""
    return norm.weight * math.sqrt(len(norm.weight))


def normed(norm: Any, linears: Sequence[Any], copied: bool) -> Head:
    """x (R, D) → `projection` of its norm, whose weight a copy has in its own."""
    within = copied and is_lean(norm.weight) and all(map(_is_known, linears))
    normalized = rms_norm(norm, weighted=not within)
    head = projection(linears, copied, norm_weight(norm) if within else None)
    return lambda x: head(normalized(x))


def added(linear: Any, copied: bool) -> Adder:
    """(residual, x) → residual + the layer of x, in one product where nothing is lost by it."""
    if copied and type(linear) is nn.Linear and linear.bias is None and is_lean(linear.weight):
        weight = linear.weight.t().contiguous()
        return lambda residual, x: torch.addmm(residual, x, weight)
    head = projection([linear], copied)
    return lambda residual, x: residual + head(x)


def copies(trunk: Any) -> bool:
    """Whether linear layers are copied: always where autocast would keep a copy in its own precision as well, else where
    that takes little memory."""
    weights = [_base(module).weight for layer in trunk.layers for module in _projections(layer) if _is_known(module)]
    if not weights or working_dtype(weights[0]) != weights[0].dtype:
        return bool(weights)
    device = weights[0].device
    free = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else COPY_BYTES
    return sum(weight.nbytes for weight in weights) <= free


def _projections(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


def projection(linears: Sequence[Any], copied: bool, factor: Tensor | None = None) -> Head:
    """x (R, D) → the outputs of linear layers of x, side by side, with adapters of PEFT where they have some; of x times
    `factor` (D,), which only copies can have.

    The copy is one matrix; on a CPU it lies in memory by columns. For 64 rows of width 256 that takes 0.7 of the time of
    three layers. Adapters are two products more, however many layers have them. What is neither torch's nor PEFT's usual
    layer is called as it is.
    """
    if not all(map(_is_known, linears)):
        return linears[0] if len(linears) == 1 else lambda x: torch.cat([module(x) for module in linears], dim=-1)
    bases = [_base(module) for module in linears]
    dtype = working_dtype(bases[0].weight)
    base = _side_by_side(bases, dtype, factor) if copied else _one_by_one(bases)
    if all(module is own for module, own in zip(linears, bases, strict=True)):
        return base
    down, up = low_rank(linears, dtype)
    down = down if factor is None else down * factor

    def adapted(x: Tensor) -> Tensor:
        return torch.addmm(base(x), F.linear(x, down), up)

    return adapted


def _side_by_side(linears: Sequence[nn.Linear], dtype: torch.dtype, factor: Tensor | None) -> Head:
    weight = torch.cat([module.weight.to(dtype) for module in linears])
    weight = weight if factor is None else weight * factor
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()
    biases: list[Tensor] = [module.bias for module in linears if module.bias is not None]
    return partial(F.linear, weight=weight, bias=torch.cat(biases).to(dtype) if biases else None)


def _one_by_one(linears: Sequence[nn.Linear]) -> Head:
    return linears[0] if len(linears) == 1 else lambda x: torch.cat([module(x) for module in linears], dim=-1)


def _is_known(module: Any) -> bool:
    """Whether it is a linear layer of torch, or one of PEFT's around it that adds the product of two matrices."""
    if type(module) is nn.Linear:
        return True
    if type(module).__module__ != "peft.tuners.lora.layer" or type(module.get_base_layer()) is not nn.Linear:
        return False
    plain = not (module.disable_adapters or module.merged or any(module.lora_bias.values()) or module.lora_variant)
    return plain and len(module.active_adapters) == 1


def _base(module: Any) -> nn.Linear:
    return module if type(module) is nn.Linear else module.get_base_layer()


def low_rank(linears: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The adapters of layers with one input as matrices (ranks, D) and (ranks, outputs), scaled; zeros in the second where
    an output is not that adapter's."""
    downs, ups = [], []
    for module in linears:
        if type(module) is nn.Linear:
            downs.append(module.weight.new_zeros(0, module.in_features, dtype=torch.float32))
            ups.append(module.weight.new_zeros(0, module.out_features, dtype=torch.float32))
            continue
        name = module.active_adapters[0]
        downs.append(module.lora_A[name].weight)
        ups.append(module.lora_B[name].weight.t() * module.scaling[name])
    return torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)
