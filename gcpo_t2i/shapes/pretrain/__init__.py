"""`gcpo-t2i pretrain`: the ShapesWorld checkpoints from nothing, in four stages that a stopped command goes on with.

    output_dir/states/      state, log and record of every stage, and vq/, the finished tokenizer
    output_dir/generator    what ships with the package, each with its model card README.md and its scores.json
    output_dir/clip
    output_dir/aesthetic

Stages import what they need when they run: a refused command answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcpo_t2i.config import PretrainConfig, check_output_dir
from gcpo_t2i.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import VQModel
    from open_clip import CLIP

    from gcpo_t2i.shapes.pretrain.cards import Measured, Sizes
    from gcpo_t2i.shapes.pretrain.stream import SceneStream

VQ_BATCH = 32
STREAM_SEEDS = {"vq": 100, "generator": 200, "clip": 300, "aesthetic": 400}  # + the seed: no stage sees another's scenes


@dataclass(frozen=True)
class Run:
    """One invocation of the command."""

    config: PretrainConfig
    out: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    @property
    def states(self) -> Path:
        return self.out / "states"

    def folder(self, stage: str) -> Path:
        """Where a stage's checkpoint goes. The tokenizer ships inside the generator."""
        return self.states / "vq" if stage == "vq" else self.out / stage

    def steps(self, stage: str) -> int:
        return getattr(self.config, f"{stage}_steps")

    def stream(self, stage: str, batch: int, tag_weights: Mapping[str, float] | None = None) -> SceneStream:
        from gcpo_t2i.shapes.pretrain.stream import SceneStream
        from gcpo_t2i.shapes.prompts import train_specs

        return SceneStream(train_specs(), batch, STREAM_SEEDS[stage] + self.config.seed, tag_weights)

    def training(self, stage: str) -> dict[str, Any]:
        """The arguments that every `train_<stage>` shares."""
        return {
            "steps": self.steps(stage),
            "folder": self.states,
            "seed": self.config.seed,
            "device": self.device,
            "dtype": self.dtype,
        }

    def load_vq(self) -> VQModel:
        from diffusers import VQModel

        vq: Any = VQModel.from_pretrained(self.folder("vq"))
        return vq.to(self.device).eval()

    def load_clip(self) -> CLIP:
        from gcpo_t2i.shapes.pretrain.clip import load_clip

        return load_clip(self.folder("clip"), self.device)


# --- stages: train and save, then measure what was saved -----------------------


def _train_vq(run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.vq import train_vq

    vq, _ = train_vq(run.stream("vq", VQ_BATCH), **run.training("vq"))
    vq.save_pretrained(run.folder("vq"))


def _measure_vq(run: Run) -> Measured:
    from gcpo_t2i.shapes.pretrain.cards import measure_vq

    return measure_vq(run.load_vq(), run.sizes)


def _train_generator(run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.generator import BATCH, TAG_WEIGHTS, train_generator

    stream = run.stream("generator", BATCH, TAG_WEIGHTS)
    policy, _ = train_generator(run.load_vq(), stream, **run.training("generator"))
    policy.save_pretrained(run.folder("generator"))
    for name in ("README.md", "scores.json"):  # the tokenizer's card goes where the tokenizer goes
        shutil.copy(run.folder("vq") / name, run.folder("generator") / "vq" / name)


def _measure_generator(run: Run) -> Measured:
    from gcpo_t2i.models.llamagen import LlamaGenPolicy
    from gcpo_t2i.shapes.pretrain.cards import measure_generator

    policy = LlamaGenPolicy.from_pretrained(run.folder("generator"), device=run.device)
    return measure_generator(policy, run.sizes)


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


@dataclass(frozen=True)
class Stage:
    """`needs`: the stages whose checkpoints it reads. `title`, `text`: of its model card."""

    train: Callable[[Run], None]
    measure: Callable[[Run], Measured]
    needs: tuple[str, ...]
    title: str
    text: str


STAGES = {
    "vq": Stage(
        _train_vq,
        _measure_vq,
        (),
        "ShapesWorld image tokenizer",
        "A `diffusers.VQModel`: 48 px images as 12 × 12 codes of a 512-entry codebook, with 4 px cells. Scores: strict "
        "GenEval (`shapes` detector) of rendered held-out scenes, and of their reconstructions, the ceiling of any "
        "generator that uses it; 95 % half-widths.",
    ),
    "generator": Stage(
        _train_generator,
        _measure_generator,
        ("vq",),
        "ShapesWorld generator",
        "A small LlamaGen policy: T5 text encoder, Llama trunk, and the image tokenizer in `vq/`, trained on ShapesWorld "
        "scenes with a tenth of the captions dropped. Load it with `gcpo_t2i.models.load_policy`. Scores: strict GenEval "
        "(`shapes` detector) of samples at temperature 1 for held-out prompts; overall is the mean over tags; 95 % "
        "half-widths.",
    ),
    "clip": Stage(
        _train_clip,
        _measure_clip,
        ("vq",),
        "ShapesWorld CLIP",
        "A tiny CLIP in open_clip's format: `open_clip.create_model_and_transforms(\"local-dir:FOLDER\")`. Scores: image → "
        "text retrieval, top-1 among 64 held-out captions of distinct meaning, drawn uniformly (nearly all ask for two "
        "coloured objects) or balanced over the tags as far as they have captions; the images are renderings, or what "
        "the tokenizer leaves of them. Where a caption also fits another's image (a circle, a red circle), no score of "
        "1 is possible.",
    ),
    "aesthetic": Stage(
        _train_aesthetic,
        _measure_aesthetic,
        ("clip",),
        "ShapesWorld aesthetic head",
        "A head on the ShapesWorld CLIP's normalised image features, on LAION's scale of 1 to 10. Nobody rated these "
        "pictures: it is a stand-in with the same interface, which has learned a formula, high for balanced, roomy, "
        "clearly coloured pictures, low for blur, noise, tints, holes and clutter "
        "(`gcpo_t2i.shapes.pretrain.aesthetic`). Scores: correlation with that formula on held-out scenes, with random "
        "damage and without.",
    ),
}


# --- the command ----------------------------------------------------------------


def pretrain(config: PretrainConfig, sizes: Sizes | None = None) -> Path:
    """Runs the stages that `config` names and that are not finished yet; returns the folder of the checkpoints.

    `sizes`: how much is measured for the cards. `overwrite` starts the named stages again, and deletes what was made
    from them. Raises UserError for a folder that may not be touched, a stage whose predecessor is missing, and for
    going on with another seed or number of steps than a stage was started with.
    """
    out = check_output_dir(config.output_dir, overwrite=config.overwrite, resume=config.resume)
    names = list(STAGES) if config.stage == "all" else [config.stage]
    _check_needs(names, out, config)
    run = _open(config, out, sizes)
    if config.overwrite:
        _remove(names, run)
    for name in names:
        _check_record(name, run)
    for name in names:
        if not _is_finished(run.folder(name)):
            _run_stage(name, run)
    return out


def _folder(out: Path, stage: str) -> Path:
    """Where a stage's checkpoint goes. The tokenizer ships inside the generator."""
    return out / "states" / "vq" if stage == "vq" else out / stage


def _is_finished(folder: Path) -> bool:
    return (folder / "scores.json").is_file()


def _check_needs(names: Sequence[str], out: Path, config: PretrainConfig) -> None:
    for name in names:
        for need in STAGES[name].needs:
            if need not in names and not _is_finished(_folder(out, need)):
                how = "--resume" if out.is_dir() and any(out.iterdir()) else ""
                command = f"gcpo-t2i pretrain --stage {need} --output_dir {config.output_dir} {how}".rstrip()
                raise UserError(f"stage '{name}' needs stage '{need}', which is not finished in '{out}'; run {command}")


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
    """Whether bfloat16 is faster than float32 there. Emulated on a CPU, it is slower."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _remove(names: Sequence[str], run: Run) -> None:
    """Deletes what these stages wrote, and those that read their checkpoints. Other files stay."""
    gone = set(names)
    for name, stage in STAGES.items():  # a stage comes after those that it needs
        if name in gone or gone.intersection(stage.needs):
            gone.add(name)
            for path in (run.folder(name), *run.states.glob(f"{name}*")):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def _read_record(path: Path) -> dict[str, Any]:
    """A stage's seed and steps, and the seconds that it has trained so far; {} if it has not begun."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_record(name: str, run: Run) -> None:
    record = _read_record(run.record(name))
    for key, value, option in (("seed", run.config.seed, "seed"), ("steps", run.steps(name), f"{name}_steps")):
        if record.get(key, value) != value:
            raise UserError(
                f"stage '{name}' in '{run.out}' was started with {option} {record[key]}, not {value}; "
                f"pass --{option} {record[key]}, or --overwrite to start it again"
            )


@contextmanager
def _timed(name: str, run: Run) -> Iterator[None]:
    """Adds the seconds spent to the stage's record, also if it is stopped in between."""
    path, start = run.record(name), time.perf_counter()
    before = _read_record(path).get("seconds", 0.0)

    def write() -> None:
        record = {"seed": run.config.seed, "steps": run.steps(name), "seconds": before + time.perf_counter() - start}
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")

    write()
    try:
        yield
    finally:
        write()


def _run_stage(name: str, run: Run) -> None:
    from gcpo_t2i.shapes.pretrain.cards import write_card

    run.states.mkdir(parents=True, exist_ok=True)
    with _timed(name, run):
        STAGES[name].train(run)
    record = _read_record(run.record(name))
    measured = STAGES[name].measure(run)
    write_card(
        run.folder(name),
        STAGES[name].title,
        STAGES[name].text,
        {"command": _command(name, run.config), **record, **machine(run.device, run.dtype)},
        measured,
    )


def _command(stage: str, config: PretrainConfig) -> str:
    """What makes this checkpoint from nothing (and its predecessors, if they are not there)."""
