"""Before the first step: devices, the model, the run folder."""

from __future__ import annotations

import copy
import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gcpo_t2i.checkpoint import about, all_in
from gcpo_t2i.config import TrainConfig, share_of_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import clear_leftovers
from gcpo_t2i.folders import check_output_dir, locked, next_run_dir, remove_output
from gcpo_t2i.models import load_policy
from gcpo_t2i.models.attention import CAUSAL_BLOCKS
from gcpo_t2i.models.hub import local_folder
from gcpo_t2i.models.lora import Adapters, WithoutAdapters, import_peft
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.processes import Processes
from gcpo_t2i.resume import check_settings
from gcpo_t2i.shapes import checkpoint_path
from gcpo_t2i.sharding import sharded_copy

EMBEDDED_MODEL = "shapesworld"


def resolve_device(name: str | None) -> torch.device:
    """`cuda` if there is one, else `cpu`, unless named. UserError for a device that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = named_device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device '{name}' is not there ({torch.cuda.device_count()} CUDA devices found); drop --device")
    return device


def named_device(name: str) -> torch.device:
    """A device that need not be there. UserError for what is no device."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is unknown; use cpu, cuda or cuda:N") from error


def use_bfloat16(dtype: str, device: torch.device) -> bool:
    return dtype == "bfloat16" or (dtype == "auto" and multiplies_bfloat16(device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16: CUDA, and CPUs with AVX512-BF16 or AMX. A rollout on
    such a CPU takes half the time of one in float32."""
    if device.type != "cpu":
        return device.type == "cuda"
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in features)


def make_accelerator(config: TrainConfig) -> Accelerator:
    device = resolve_device(config.device)
    precision = "bf16" if use_bfloat16(config.dtype, device) else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of a run before this one in the same process, in another precision
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    share_of_prompts(config.prompts_per_step, accelerator.num_processes)
    return accelerator


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """What sampling outside of a training run goes on in: bfloat16 layers where `use_bfloat16` says so."""
    return torch.autocast(device.type, torch.bfloat16) if use_bfloat16(dtype, device) else nullcontext()


def model_folder(name: str) -> Path:
    """The folder of the shipped model for `shapesworld`, else the policy folder of that name, or of that repository."""
    return checkpoint_path("generator") if name == EMBEDDED_MODEL else local_folder(name)


def load_model(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Policy:
    """The policy in `model_folder(name)`; float32 weights unless told otherwise, autocast lowers them."""
    return tuned(load_policy(model_folder(name), device=device, dtype=dtype), device)


def tuned(policy: Any, device: torch.device) -> Any:
    """The policy, and torch, set to what is fast on the device."""
    if device.type == "cpu":
        # Lets oneDNN multiply float32 matrices instead of MKL, which has no fast path for AMD's CPUs: an update takes
        # half the time. (Where the CPU multiplies bfloat16 and oneDNN finds that faster, it may round to that first.)
        torch.set_float32_matmul_precision("medium")
        policy.trunk.set_attn_implementation(CAUSAL_BLOCKS)
    return policy


def load_to_train(config: TrainConfig, device: torch.device) -> tuple[Policy, Adapters | None]:
    """The policy that `config` trains, and its adapters if it is they that are trained.

    Weights that stay as they are need no more digits than the layers that read them.
    """
    if config.lora.rank is None:
        return load_model(config.model, device), None
    import_peft()  # before the weights are read
    policy = load_model(config.model, device, torch.bfloat16 if use_bfloat16(config.dtype, device) else None)
    return policy, Adapters.add(policy, config.lora, config.model, config.seed)


def starting_model(policy: Policy, adapters: Adapters | None, sharded: bool = False) -> Any:
    """What scores as `policy` does now, whatever is trained later: a frozen copy, or the policy without its adapters."""
    if adapters is not None:
        return WithoutAdapters(policy, adapters)
    return (sharded_copy(policy) if sharded else copy.deepcopy(policy)).requires_grad_(False)


@dataclass(frozen=True)
class Run:
    """A run folder that is ours. `checkpoint`: where to go on from; `notes`: what the user should know about that."""

    folder: Path
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def go_on(run: Run, processes: Processes) -> str:
    """How to go on with a run that ended before its time."""
    program = "gcpo-t2i" if processes.count == 1 else "accelerate launch ... -m gcpo_t2i"
    return f"go on with: {program} train --output_dir {shlex.quote(str(run.folder))} --resume"


@contextmanager
def open_run(config: TrainConfig, processes: Processes) -> Iterator[Run]:
    """Makes the run folder, or opens it to go on. Sets `config.output_dir` if that was open.

    UserError if it holds a run that neither flag allows to touch, if another process uses it, or if the settings
    contradict those of the checkpoint to go on from; nothing in it has changed then.
    """
    with ExitStack() as stack:

        def claim() -> tuple[str, Path | None, list[str]] | None:
            return _claim(config, stack) if processes.index == 0 else None

        found = processes.gather(processes.together(claim))[0]
        assert found is not None
        folder, checkpoint, notes = found
        config.output_dir = folder
        yield Run(Path(folder), checkpoint, tuple(notes))


def _claim(config: TrainConfig, stack: ExitStack) -> tuple[str, Path | None, list[str]]:
    """The run folder, made if it is not there, emptied if it shall be, and locked until the stack is closed; the checkpoint
    to go on from; notes on that."""
    folder = Path(config.output_dir) if config.output_dir else next_run_dir(config.algorithm)
    check_output_dir(folder, overwrite=config.overwrite, resume=config.resume)
    folder.mkdir(parents=True, exist_ok=config.output_dir is not None)
    stack.enter_context(locked(folder))
    checkpoint, notes = _to_resume(folder, config) if config.resume else (None, [])
    clear_leftovers(folder)
    if config.overwrite:
        remove_output(folder, "config.yaml", "run")
    return str(folder), checkpoint, notes


def _to_resume(folder: Path, config: TrainConfig) -> tuple[Path | None, list[str]]:
    checkpoints = all_in(folder)
    if not checkpoints and not (folder / "config.yaml").is_file():
        raise UserError(f"output folder '{folder}' holds no run to resume; drop --resume, and name an empty folder")
    if not checkpoints:
        return None, ["there is no checkpoint yet: the run starts again"]
    return checkpoints[-1], check_settings(str(checkpoints[-1]), about(checkpoints[-1]), config)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
