"""A reward that fails in the middle of a training run: a clear error, and what was learned is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gcpo_t2i.cli import main
from tests.tiny import train_command

DYING = """
from pathlib import Path

import numpy as np


def bright(images, prompts):
    flag = Path(__file__).with_name("calls")
    calls = int(flag.read_text()) + 1 if flag.exists() else 1
    flag.write_text(str(calls))
    if calls in {calls}:
        raise RuntimeError("the server is gone")
    return [float(np.asarray(image).mean()) / 255 for image in images]
"""


def dying(folder: Path, *calls: int) -> Path:
    path = folder / "dying.py"
    path.write_text(DYING.replace("{calls}", str(set(calls)) if calls else "()"))
    (folder / "calls").unlink(missing_ok=True)
    return path


def rows(run: Path) -> list[dict]:
    keep = ("step", "reward", "loss", "kl", "grad_norm")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in keep} for row in lines if "loss" in row]


def test_a_run_goes_on_where_a_reward_died(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    # Calls: evaluation before the first step, steps 1 and 2, step 3.
    for name, calls in (("whole", ()), ("broken", (4,))):
        folder = tmp_path / name
        folder.mkdir()
        command = [*train_command(tiny_folder, dying(folder, *calls), folder), "--save_every", "0", "--seed", "3"]
        command += ["--monitor.rewards", "[]"]
        code = main(command)
        said = " ".join(capsys.readouterr().err.split())
        runs[name] = folder / "run"
        if calls:
            assert code == 2
            assert "raised RuntimeError: the server is gone; stopped after step 2; go on with: gcpo-t2i train" in said
            assert [path.name for path in runs[name].glob("checkpoint-*")] == ["checkpoint-2"]
            resume = re.search(r"go on with: gcpo-t2i (train .*--resume)", said)
            assert resume and main(["train", "--output_dir", str(runs[name]), "--resume"]) == 0
        else:
            assert code == 0
    assert rows(runs["broken"]) == rows(runs["whole"])  # to the last bit: the step was made again from where it began


def test_before_the_first_step_there_is_nothing_to_keep(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_command(tiny_folder, dying(tmp_path, 2), tmp_path), "--monitor.rewards", "[]"]) == 2
    assert "the server is gone" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_prompt_that_lacks_its_specification_ends_the_run_before_it_starts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "mixed.jsonl"
    prompts.write_text('{"prompt": "a red circle", "include": [{"class": "circle", "count": 1}]}\n{"prompt": "x"}\n')
    command = train_command(tiny_folder, dying(tmp_path), tmp_path)
    assert main([*command, "--rewards", '[{"name": "geneval"}]', "--train_prompts", str(prompts)]) == 2
    assert f"{prompts}, line 2: the prompt 'x' has no \"include\"" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
