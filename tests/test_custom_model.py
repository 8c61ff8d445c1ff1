"""The example of docs/custom_model.md, run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "custom_model.md"


def test_the_example_of_the_guide_trains_and_is_consistent(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n# pixels.py\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "pixels.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "pixels.py", "20"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / done.stdout.split()[-1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 20 and all(row["logp_gap/replay"] < 1e-4 for row in steps)
    assert all(row["credit/top40_mass"] > 0.7 for row in steps)  # the null prompt is another one
    before, after = (row for row in rows if "eval/bright" in row)
    assert after["eval/bright"] - before["eval/bright"] > 2 * before["eval/bright_ci95"]
    assert json.loads((run / "policy" / "model_index.json").read_text())["_class_name"] == "PixelPolicy"
