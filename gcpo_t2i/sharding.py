"""What learns, spread over the processes of a run (FSDP2, `torch.distributed.fsdp.fully_shard`).

The layers of the trunk that learns, their gradients and their optimizer states are sharded, and so are those of the reference.
The policy itself stays whole in every process and takes over the new weights after every step: sampling calls parts of layers,
which a sharded layer does not allow, and needs all weights at hand for hundreds of passes. So all that samples, evaluates and
saves knows nothing of this, and checkpoints are the same with and without.

Left out: sharding of embeddings and heads, whose gradients are summed as those of other runs; prefetching between layers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gcpo_t2i.config import LoraConfig
from gcpo_t2i.errors import UserError


def is_wanted(lora: LoraConfig) -> bool:
    """Whether `accelerate launch` was told to shard: to be asked before an Accelerator is made or weights are read.

    UserError for a kind of it that there is none of here.
    """
    strange = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
    for key, name in strange.items():
        if os.environ.get(f"ACCELERATE_USE_{key}") == "true":
            raise UserError(f"accelerate was told to use {name}; use configs/accelerate/fsdp2.yaml, or ddp.yaml")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate was told to use FSDP 1; set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml")
    if lora.rank is not None:
        raise UserError("lora.rank leaves FSDP2 nothing to spread but small adapters; use configs/accelerate/ddp.yaml")
    # Else transformers reads weights in one process of each machine only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "False"
    return True


def sharded_copy(policy: Any) -> Any:
    """The policy again, with the layers of its trunk sharded over all processes. The two have frozen parameters in common."""
    if not hasattr(policy, "trunk"):
        raise UserError(f"FSDP2: {type(policy).__name__} has no trunk to be sharded; use configs/accelerate/ddp.yaml")
    learning = {id(parameter) for parameter in policy.set_trainable()}
    common = {id(parameter): parameter for parameter in policy.parameters() if id(parameter) not in learning}
    # Those of layers need no copy either: a shard is one.
    twin = copy.deepcopy(policy, common | {id(parameter): parameter for parameter in policy.trunk.layers.parameters()})
    device = next(policy.trunk.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in twin.trunk.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        _sum_gradients(layer)
    return twin


def _sum_gradients(layer: Any) -> None:
    """Instead of FSDP's mean: the weights of the loss count all processes."""
    set_divisor = getattr(layer, "set_gradient_divide_factor", None) or layer.set_reduce_scatter_divide_factor
    set_divisor(1.0)  # its older name is that of torch 2.6 and 2.7
    if hasattr(
        layer, "set_force_sum_reduction_for_comms"
    ):  # else by a multiplication that only NCCL knows, and gloo does not
        layer.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all processes together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_to(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Sets each target to its source, of which either may be sharded."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(like(whole(source), target))


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """As `nn.utils.clip_grad_norm_`, of sharded and other parameters together; returns the norm before."""
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    sharded, others = [p for p in learning if is_sharded(p)], [p for p in learning if not is_sharded(p)]
    kinds = [kind for kind in (sharded, others) if kind]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    if not norms:
        return 0.0
    total = norms[0] if len(norms) == 1 else torch.hypot(*norms)
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    return total.item()


def whole_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, on the CPU where any is sharded. All processes must call it; those that do
    not `keep` it get no tensors."""
    found = optimizer.state_dict()
    if not any(is_sharded(value) for own in found["state"].values() for value in own.values()):
        return found
    state: dict[int, dict[str, Any]] = {}
    for number, own in found["state"].items():
        state[number] = {}
        for name, value in own.items():
            gathered = whole(value)
            if keep:
                state[number][name] = gathered.cpu()
    return {**found, "state": state}


def load_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Puts what `whole_state` gave into an optimizer, sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in own.items()
        }
        for number, own in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
