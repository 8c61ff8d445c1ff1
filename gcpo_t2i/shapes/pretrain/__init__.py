"""`gcpo-t2i pretrain`: the shipped checkpoints from nothing, in five stages that a stopped command goes on with.

    output_dir/states/      state, log and record of every stage, and vq/, the finished tokenizer
    output_dir/generator    what ships with the package, each with its model card README.md and its scores.json
    output_dir/clip
    output_dir/aesthetic
    output_dir/reasoner

Stages import what they need when they run, so that a command that cannot work says so at once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcpo_t2i.config import PretrainConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.folders import check_output_dir

if TYPE_CHECKING:
    import torch
    from diffusers import VQModel
    from open_clip import CLIP

    from gcpo_t2i.shapes.pretrain.cards import Measured, Sizes
    from gcpo_t2i.shapes.pretrain.stream import SceneStream

STREAM_SEEDS = {
    "vq": 100,
    "generator": 200,
    "clip": 300,
    "aesthetic": 400,
}  # + the seed: each stage sees its own scenes


@dataclass(frozen=True)
class Run:
    """One invocation of the command."""

    config: PretrainConfig
    out: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    def folder(self, stage: str) -> Path:
        return _folder(self.out, stage)

    def training(self, stage: str) -> dict[str, Any]:
        """The arguments that every `train_<stage>` shares."""
        steps, seed = _steps(self.config, stage), self.config.seed
        return {
            "steps": steps,
            "folder": self.out / "states",
            "seed": seed,
            "device": self.device,
            "dtype": self.dtype,
        }

    def stream(self, stage: str, batch: int, tag_weights: Mapping[str, float] | None = None) -> SceneStream:
        from gcpo_t2i.shapes.pretrain.stream import SceneStream
        from gcpo_t2i.shapes.prompts import train_specs

        return SceneStream(train_specs(), batch, STREAM_SEEDS[stage] + self.config.seed, tag_weights)

    def load_vq(self) -> VQModel:
        from diffusers import VQModel

        vq: Any = VQModel.from_pretrained(self.folder("vq"))
        return vq.to(self.device).eval()

    def load_clip(self) -> CLIP:
        from gcpo_t2i.shapes.pretrain.clip import load_clip

        return load_clip(self.folder("clip"), self.device)


# --- stages: train and save, then measure what was saved ------------------------


def _train_vq(run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.vq import BATCH, train_vq

    vq, _ = train_vq(run.stream("vq", BATCH), **run.training("vq"))
    vq.save_pretrained(run.folder("vq"))


def _measure_vq(run: Run) -> Measured:
    from gcpo_t2i.shapes.pretrain.cards import measure_vq

    return measure_vq(run.load_vq(), run.sizes)


def _train_generator(run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.generator import BATCH, train_generator

    policy, _ = train_generator(run.load_vq(), run.stream("generator", BATCH), **run.training("generator"))
    policy.save_pretrained(run.folder("generator"))
    for name in ("README.md", "scores.json"):  # the tokenizer's card goes where the tokenizer goes
        shutil.copy(run.folder("vq") / name, run.folder("generator") / "vq" / name)


def _measure_generator(run: Run) -> Measured:
    from gcpo_t2i.models.llamagen import LlamaGenPolicy
    from gcpo_t2i.shapes.pretrain.cards import measure_generator

    policy = LlamaGenPolicy.from_pretrained(run.folder("generator"), device=run.device)
    return measure_generator(policy, run.sizes, run.device)


def _train_clip(run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.clip import BATCH, TAG_WEIGHTS, save_clip, train_clip

    model, _ = train_clip(run.stream("clip", BATCH, TAG_WEIGHTS), **run.training("clip"))
    save_clip(model, run.folder("clip"))


def _measure_clip(run: Run) -> Measured:
    from gcpo_t2i.shapes.pretrain.cards import measure_clip

    return measure_clip(run.load_clip(), run.load_vq(), run.sizes, run.device)


def _train_aesthetic(run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.aesthetic import BATCH, train_aesthetic

    head, _ = train_aesthetic(run.load_clip(), run.stream("aesthetic", BATCH), **run.training("aesthetic"))
    head.save_pretrained(run.folder("aesthetic"))


def _measure_aesthetic(run: Run) -> Measured:
    from gcpo_t2i.shapes.pretrain.aesthetic import load_head
    from gcpo_t2i.shapes.pretrain.cards import measure_aesthetic

    return measure_aesthetic(run.load_clip(), load_head(run.folder("aesthetic"), run.device), run.sizes, run.device)


def _train_reasoner(run: Run) -> None:
    from gcpo_t2i.cot.arithmetic.pretrain import save_reasoner, train_reasoner

    model, _ = train_reasoner(**run.training("reasoner"))
    save_reasoner(model, run.folder("reasoner"))


def _measure_reasoner(run: Run) -> Measured:
    from gcpo_t2i.cot.arithmetic.pretrain import measure_reasoner
    from gcpo_t2i.shapes.pretrain.cards import Measured, stored_parameters

    folder = run.folder("reasoner")
    return Measured(stored_parameters(folder), measure_reasoner(folder, run.sizes.questions, run.device))


@dataclass(frozen=True)
class Stage:
    """`needs`: the stages whose checkpoints it reads."""

    train: Callable[[Run], None]
    measure: Callable[[Run], Measured]
    needs: tuple[str, ...] = ()


STAGES = {
    "vq": Stage(_train_vq, _measure_vq),
    "generator": Stage(_train_generator, _measure_generator, needs=("vq",)),
    "clip": Stage(_train_clip, _measure_clip, needs=("vq",)),
    "aesthetic": Stage(_train_aesthetic, _measure_aesthetic, needs=("clip",)),
    "reasoner": Stage(_train_reasoner, _measure_reasoner),
}


# --- the command ----------------------------------------------------------------


def pretrain(config: PretrainConfig, sizes: Sizes | None = None) -> Path:
    """Runs the stages that `config` names and that are not finished yet; returns the folder of the checkpoints.

    `sizes`: how much is measured for the cards. `overwrite` starts the named stages again and deletes what was made
    from them. Raises UserError for a folder that may not be touched, a stage whose predecessor is missing, and for
    another seed or number of steps than a stage was made with.
    """
    out = check_output_dir(config.output_dir, overwrite=config.overwrite, resume=config.resume)
    names = list(STAGES) if config.stage == "all" else [config.stage]
    _check_needs(names, out, config)
    if config.overwrite:
        _remove(names, out)
    for name in names:
        _check_record(name, out, config)
    run = _open(config, out, sizes)
    for name in names:
        if not _is_finished(out, name):
            _run_stage(name, run)
    return out


def _folder(out: Path, stage: str) -> Path:
    """Where a stage's checkpoint goes. The tokenizer ships inside the generator."""
    return out / "states" / "vq" if stage == "vq" else out / stage


def _steps(config: PretrainConfig, stage: str) -> int:
    return getattr(config, f"{stage}_steps")


def _is_finished(out: Path, stage: str) -> bool:
    return (_folder(out, stage) / "scores.json").is_file()


def _check_needs(names: Sequence[str], out: Path, config: PretrainConfig) -> None:
    for name in names:
        for need in STAGES[name].needs:
            if need not in names and not _is_finished(out, need):
                used = " --resume" if out.is_dir() and any(out.iterdir()) else ""
                command = f"gcpo-t2i pretrain --stage {need} --output_dir {config.output_dir}{used}"
                raise UserError(
                    f"stage '{name}' needs '{need}', which is not finished in '{out}'; first run: {command}"
                )


def _remove(names: Sequence[str], out: Path) -> None:
    """Deletes what these stages wrote, and what was made from it. Other files stay."""
    gone = set(names)
    for name, stage in STAGES.items():  # a stage comes after those that it needs
        if name in gone or gone.intersection(stage.needs):
            gone.add(name)
            shutil.rmtree(_folder(out, name), ignore_errors=True)
            for path in (out / "states").glob(f"{name}*.*"):
                path.unlink()


def _read_record(out: Path, stage: str) -> dict[str, Any]:
    """A stage's seed and steps, and the seconds that it has trained so far; {} if it has not begun."""
    path = out / "states" / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_record(stage: str, out: Path, config: PretrainConfig) -> None:
    """A stage goes on only as it began. Whether an unfinished one may get more steps, its learning rate decides (`fit`)."""
    record = _read_record(out, stage)
    asked = {"seed": ("seed", config.seed)}
    if _is_finished(out, stage):
        asked["steps"] = (f"{stage}_steps", _steps(config, stage))
    for key, (option, value) in asked.items():
        if record.get(key, value) != value:
            raise UserError(
                f"stage '{stage}' in '{out}' was made with {option} {record[key]}, not {value}; "
                f"pass --{option} {record[key]}, or --overwrite to start it again"
            )


def _open(config: PretrainConfig, out: Path, sizes: Sizes | None) -> Run:
    import torch

    from gcpo_t2i.run import resolve_device
    from gcpo_t2i.shapes.pretrain.cards import Sizes

    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return Run(config, out, device, dtype, sizes or Sizes())


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster type there: an emulated one is slower than float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _run_stage(name: str, run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.cards import machine, write_card

    (run.out / "states").mkdir(parents=True, exist_ok=True)
    with _timed(name, run):
        STAGES[name].train(run)
    facts = {"stage": name, "command": _command(run.config), **_read_record(run.out, name)}
    write_card(run.folder(name), facts | machine(run.device, run.dtype), STAGES[name].measure(run))


@contextmanager
def _timed(stage: str, run: Run) -> Iterator[None]:
    """Keeps the stage's record, to which the seconds spent are added, also if it is stopped in between."""
    before, start = _read_record(run.out, stage).get("seconds", 0.0), time.perf_counter()

    def write() -> None:
        seconds = before + time.perf_counter() - start
        record = {"seed": run.config.seed, "steps": _steps(run.config, stage), "seconds": round(seconds, 1)}
        (run.out / "states" / f"{stage}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    write()
    try:
        yield
    finally:
        write()


def _command(config: PretrainConfig) -> str:
    """What makes these checkpoints: the settings that decide what comes out, where they are not the defaults."""
    default = asdict(PretrainConfig())
    decisive = {key: value for key, value in asdict(config).items() if key == "seed" or key.endswith("_steps")}
    flags = [f"--{key} {value}" for key, value in decisive.items() if value != default[key]]
    return " ".join(["gcpo-t2i pretrain", *flags])
