"""Every algorithm row on ShapesWorld with the same budget: runs, then a table of held-out strict scores with intervals.

    python benchmarks/rows.py --out runs/rows [--seeds 0 1 2] [--rows grpo dapo …] [--threads 2] [--steps N]

Each run is `gcpo-t2i train --config configs/shapesworld_ROW.yaml --seed S` in a process of its own. A finished run is
not repeated, so an interrupted comparison goes on where it was. The table: score before and after on the same held-out
prompts and evaluation seed; the interval is over the training seeds (Student's t), beside it the half-width of one
evaluation. `images` counts all sampled training images, which is what dapo pays for its replaced groups.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from scipy.stats import t as student

ROWS = ("grpo", "dapo", "gspo", "guidance_gcpo", "random_credit")
SCORE = "eval/geneval/strict"


def run(row: str, seed: int, folder: Path, threads: int, steps: int | None) -> None:
    if (folder / "policy" / "README.md").exists():
        return
    command = [sys.executable, "-m", "gcpo_t2i", "train", "--config", f"configs/shapesworld_{row}.yaml"]
    command += ["--seed", str(seed), "--output_dir", str(folder), "--overwrite"]
    command += ["--steps", str(steps)] if steps else []
    print(" ".join(command[2:]), flush=True)
    started = time.perf_counter()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    (folder / "wall.json").write_text(json.dumps({"seconds": time.perf_counter() - started, "threads": threads}))


def read(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if SCORE in line]
    steps = [line for line in lines if "reward" in line]
    return {
        "before": evaluations[0][SCORE],
        "after": evaluations[-1][SCORE],
        "half": evaluations[-1][f"{SCORE}_ci95"],
        "images": sum(line["images_per_second"] * line["step_time"] for line in steps),
        "seconds": json.loads((folder / "wall.json").read_text())["seconds"],
        "memory": max(line["peak_memory_mb"] for line in steps),
        **{
            f"after/{key.removeprefix(SCORE + '/')}": value
            for key, value in evaluations[-1].items()
            if key.startswith(SCORE + "/")
        },
    }


def interval(values: list[float]) -> float:
    """Half-width of the 95 % Student interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rows"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:  # seed by seed, so that an interrupted comparison holds whole columns
        for row in args.rows:
            run(row, seed, args.out / f"{row}-seed{seed}", args.threads, args.steps)
    results = {row: [read(args.out / f"{row}-seed{seed}") for seed in args.seeds] for row in args.rows}
    (args.out / "rows.json").write_text(json.dumps({"seeds": args.seeds, "results": results}, indent=2))
    print("| row | before | after, mean ± 95 % over seeds | each seed (± one evaluation) | change | images | minutes |")
    print("|---|---|---|---|---|---|---|")
    for row, runs in results.items():
        after = [one["after"] for one in runs]
        each = ", ".join(f"{one['after']:.3f} ± {one['half']:.3f}" for one in runs)
        mean, before = statistics.mean(after), statistics.mean(one["before"] for one in runs)
        minutes = statistics.mean(one["seconds"] for one in runs) / 60
        images = statistics.mean(one["images"] for one in runs)
        print(
            f"| `{row}` | {before:.3f} | {mean:.3f} ± {interval(after):.3f} | {each} | {mean - before:+.3f} "
            f"| {images:.0f} | {minutes:.1f} |"
        )


if __name__ == "__main__":
    main()
