"""`gcpo-t2i compare --of texts`: the machinery of images, on language models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gcpo_t2i.cli import main
from tests.test_compare import started  # noqa: F401, a fixture
from tests.tiny_text import tiny_text_model

ROWS = [{"question": f"Ann has {number} pens.", "answer": "2"} for number in ("two", "three", "four")]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    model, tokenizer = tiny_text_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def even(completion_ids, **_):\n    return [sum(t % 2 for t in ids) / 9 for ids in completion_ids]\n"
    )
    settings = {
        **{"model": tmp_path / "model", "train_data": data, "eval.data": data, "reward": f"{reward}:even", "steps": 2},
        **{"questions_per_step": 2, "group_size": 4, "max_answer_tokens": 9, "device": "cpu", "eval.num_questions": 3},
    }
    shared = [text for key, value in settings.items() for text in (f"--cot.{key}", str(value))]
    own = ["--algorithms", "grpo", "random_credit", "--seeds", "0", "1", "--output_dir", str(tmp_path / "c")]
    return ["compare", "--of", "texts", *own, *shared]


def test_two_algorithms_with_two_seeds(command, tmp_path, started, capsys):  # noqa: F811
    assert main(command) == 0
    names = ["grpo-seed0", "random_credit-seed0", "grpo-seed1", "random_credit-seed1"]
    assert [Path(line[line.index("--output_dir") + 1]).name for line in started] == names
    assert all(line[3:5] == ["cot", "train"] for line in started)
    results = json.loads((tmp_path / "c" / "compare.json").read_text())["even"]
    for name in ("grpo", "random_credit"):
        last = []
        for seed in (0, 1):
            lines = (tmp_path / "c" / f"{name}-seed{seed}" / "metrics.jsonl").read_text().splitlines()
            last.append([row for row in map(json.loads, lines) if "eval/even" in row][-1]["eval/even"])
        assert results[name]["after"]["mean"] == pytest.approx(sum(last) / 2)
        assert results[name]["images"] == 16  # 2 steps of 2 questions × 4 answers
    table = (tmp_path / "c" / "compare.md").read_text()
    assert table.startswith("## Held-out even") and "| answers | minutes |" in table
    started.clear()
    capsys.readouterr()
    assert main(command) == 0 and started == []
    assert main([*command, "--cot.steps", "3"]) == 2
    assert "cot.steps (there 2, now 3)" in capsys.readouterr().err
    assert main([*command, "--of", "images"]) == 2
    assert "holds a comparison of other models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algorithms", "stage"], "algorithms: algorithm 'stage' reads the codes of images"),
        (["--cot.group_size", "1"], "cot.group_size: group_size must be at least 2"),
        (["--cot.overwrite"], "cot.overwrite: finished runs stay"),
    ],
)
def test_what_cannot_be(command, options, message, capsys):
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
