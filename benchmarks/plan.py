"""`gcpo-t2i plan` against the training that it predicts: memory, and time by phase, for two models.

    python benchmarks/plan.py [--models default large] [--steps 4] [--busy] [--out plan.json]

`default` is the embedded model, `large` a random one of ten times its trained parameters (width 512, 9 layers). For each:
`gcpo-t2i plan --json`, then `gcpo-t2i train` with the same options, both in a process of their own; the training's figures
are the median over its steps but the first (time) and the maximum (memory) of metrics.jsonl. With `--busy` both count CPU
seconds of one thread instead of the wall clock, which on a machine with other work is the time it would take without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gcpo_t2i.models import load_policy
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.run import EMBEDDED_MODEL, model_folder

RUN = "import sys, time\n{}from gcpo_t2i.cli import main\nsys.exit(main(sys.argv[1:]))"
CPU_CLOCK = "time.perf_counter = time.process_time\n"
FEW_EVALUATIONS = ["--eval.num_prompts", "6"]


def large_model(folder: Path) -> str:
    """A policy of random weights around the embedded tokenizer and image codes."""
    small = load_policy(model_folder(EMBEDDED_MODEL))
    assert isinstance(small, LlamaGenPolicy)
    torch.manual_seed(0)
    policy = LlamaGenPolicy.build(
        tokenizer=small.tokenizer,
        vq_model=small.vq,
        grid=small.grid,
        caption_tokens=small.caption_tokens,
        dim=512,
        layers=9,
        heads=8,
        text_dim=small.adapter.sizes["text_dim"],
    )
    policy.save_pretrained(folder)
    return str(folder)


def run(command: str, options: list[str], busy: bool) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if busy else dict(os.environ)
    line = [sys.executable, "-c", RUN.format(CPU_CLOCK if busy else ""), command, *options]
    return subprocess.run(line, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def predicted(options: list[str], busy: bool) -> dict[str, float]:
    plan = json.loads(run("plan", [*options, "--json"], busy))
    times = plan["times"]
    return {
        "rollout (s)": times["rollout"] + times["decode"],
        "reward (s)": times["reward"],
        "update (s)": times["update"],
        "step (s)": times["step"],
        "peak memory (MB)": plan["memory"]["peak"] / 2**20,
    }


def measured(options: list[str], folder: Path, busy: bool) -> dict[str, float]:
    run("train", [*options, "--output_dir", str(folder)], busy)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    names = {"rollout_time": "rollout (s)", "reward_time": "reward (s)", "update_time": "update (s)"}
    names["step_time"] = "step (s)"
    times = {name: statistics.median(step[key] for step in steps[1:]) for key, name in names.items()}
    return {**times, "peak memory (MB)": max(step["peak_memory_mb"] for step in steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["default", "large"], choices=["default", "large"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    print("| model | | predicted | measured | predicted/measured |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            folder = Path(temporary) / name
            model = EMBEDDED_MODEL if name == "default" else large_model(folder / "model")
            options = ["--model", model, "--steps", str(args.steps), *FEW_EVALUATIONS]
            expected, found = predicted(options, args.busy), measured(options, folder / "run", args.busy)
            results[name] = {"predicted": expected, "measured": found}
            for key in found:
                row = f"| {name} | {key} | {expected[key]:.4g} | {found[key]:.4g} | {expected[key] / found[key]:.2f} |"
                print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "busy": args.busy, "results": results}, indent=2))


if __name__ == "__main__":
    main()
