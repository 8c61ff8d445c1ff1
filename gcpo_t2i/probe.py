"""`gcpo-t2i probe`: does this set-up learn at all? A few steps on a few prompts with a reward that every model can raise.

The run is that of `gcpo-t2i train` with the same settings, but for what would hide the answer:

- The first few training prompts, the same at every step: the curve is then of the policy and not of the prompts.
- The reward is how red the image is, R − (G + B) / 2 on average over its pixels. It is linear in every pixel, so it has no
  threshold and no ties, and codes add up in it; groups differ in it unless their images are equal or grey; it is not yet at
  its limit for any model that draws. (A share of red pixels is 0 for every image of a model that draws none. Brightness is
  at its limit on white backgrounds, and falls with the embedded model and its default learning rate: see docs/probe.md.)
- The learning rate is at its peak after two steps and stays there: 20 steps of a warm-up of 500 would show nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from gcpo_t2i.config import ProbeConfig, RewardConfig, TrainConfig
from gcpo_t2i.data import Prompt, PromptSampler
from gcpo_t2i.diagnosis import curve, faults, spread, trend, verdict, why_not
from gcpo_t2i.report import Report
from gcpo_t2i.run import open_run
from gcpo_t2i.train import MAX_BAD_STEPS, Trainer
from gcpo_t2i.yaml_files import save_config

PROMPTS = 4  # different ones; a step repeats them to fill prompts_per_step
WARMUP = 2


def redness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Mean over all pixels of R − (G + B) / 2: 1 for a red image, 0 for a grey one, −1 for one in cyan."""
    colors = [np.asarray(image.convert("RGB")).mean((0, 1)) / 255 for image in images]
    return [float(red - (green + blue) / 2) for red, green, blue in colors]


redness.range = (-1.0, 1.0)  # type: ignore[attr-defined]


def probe(config: ProbeConfig) -> int:
    """Probes the set-up, prints verdict, curve and causes, writes them to `probe.json`; 0 if it learns, else 1."""
    folder = config.output_dir or tempfile.mkdtemp(prefix="gcpo-t2i-probe-")
    rows = run(probe_settings(config, folder))
    rewards = [row["reward"] for row in rows]
    line, unit = trend(rewards), spread(rows)
    findings = faults(rows)
    said = verdict(line, unit, findings)
    if said != "learns" and not findings:
        findings = [why_not(rows, line, unit, config.optim.learning_rate)]
    console = Console(highlight=False)
    gain = f"{line.gain:+.4f} ± {line.error:.4f}"
    console.print(f"\nreward (redness) at each step, and its trend\n\n{curve(rewards, line)}\n")
    console.print(
        f"[bold]{said}[/]: {gain} (standard error) in {len(rows)} steps, from {line.start:.4f}; images of a prompt differ by "
        f"{unit:.4f} (standard deviation)"
    )
    for number, finding in enumerate(findings):
        console.print(f"{'likely cause' if number == 0 and said != 'learns' else 'also'}: {finding}", soft_wrap=True)
    result = {"verdict": said, **asdict(line), "spread": unit, "findings": [asdict(finding) for finding in findings]}
    (Path(folder) / "probe.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if said == "learns" else 1


def probe_settings(config: ProbeConfig, folder: str) -> TrainConfig:
    """The run that is made: `config`'s, without evaluation and checkpoints, with the probe's reward and learning rate."""
    same: dict[str, Any] = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    optim = replace(config.optim, schedule="constant", warmup_steps=min(config.optim.warmup_steps, WARMUP))
    held_out = replace(config.eval, prompts=config.train_prompts, rewards=[])  # nothing is loaded for evaluations
    rewards = [RewardConfig(f"{__name__}:{redness.__name__}")]
    return TrainConfig(**same | {"output_dir": folder, "rewards": rewards, "optim": optim, "eval": held_out})


def run(config: TrainConfig) -> list[dict[str, Any]]:
    """The metrics of every step; fewer of them if the loss is not finite again and again. UserError as from training."""
    trainer = Trainer(config)
    few = trainer.prompts.batch(0, min(PROMPTS, config.prompts_per_step))
    trainer.prompts = PromptSampler([Prompt(prompt.text, prompt.negative) for prompt in few], config.seed)
    rows = []
    with (
        open_run(config, trainer.processes) as opened,
        Report(config, opened, trainer.accelerator, start=0) as report,
    ):
        save_config(config, opened.folder / "config.yaml")
        while trainer.state.step < config.steps and trainer.state.bad_steps < MAX_BAD_STEPS - 1:
            metrics, batch, maps = trainer.step()
            report.step(trainer.state.step, metrics, batch, maps)
            rows.append(metrics)
    return rows
