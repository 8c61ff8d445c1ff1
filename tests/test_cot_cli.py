"""`gcpo-t2i cot train` and `cot heatmap`, and everything that can be wrong with what a user gives them: one line each."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gcpo_t2i.cli import main
from gcpo_t2i.config import CotTrainConfig
from gcpo_t2i.cot.algorithms import TEXT_ROWS, text_algorithm
from gcpo_t2i.cot.questions import load_questions
from gcpo_t2i.cot.train import trl_settings
from gcpo_t2i.cot.versions import TESTED
from gcpo_t2i.parsing import load_config
from tests import ranks
from tests.tiny_text import tiny_text_model

ROWS = [
    {"question": "Ann has two pens. She buys three more.", "answer": "5", "gold": "two plus three is five. answer: 5"},
    {"question": "Ben has nine cards. He sells one.", "answer": "8"},
    {"question": "Eva has four coins. She doubles them.", "answer": 8, "gold": None},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved language model of random weights. Read only."""
    folder = tmp_path_factory.mktemp("tiny_text")
    model, tokenizer = tiny_text_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(folder: Path, rows: list) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def command(tiny: Path, tmp: Path, *options: str, rows: list | None = None) -> list[str]:
    """A run of two steps of two questions × two answers."""
    data = jsonl(tmp, rows or ROWS)
    small = ["--steps", "2", "--questions_per_step", "2", "--group_size", "2", "--max_answer_tokens", "16"]
    where = ["--model", str(tiny), "--train_data", data, "--output_dir", str(tmp / "run"), "--device", "cpu"]
    return ["cot", "train", *where, *small, "--eval.data", data, "--eval.num_questions", "3", *options]


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_settings_metrics_answers_and_a_policy_that_goes_on(tiny, tmp_path, capsys):
    assert main(command(tiny, tmp_path)) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    assert "held-out accuracy after step 0: 0.000" in out and "held-out accuracy after step 2" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert rows[0]["eval/accuracy"] == 0 and rows[1]["reward"] == 0 and rows[1]["answers_per_second"] > 0
    answers = [json.loads(line) for line in (run / "eval" / "step-000002.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in answers] == [row["question"] for row in ROWS]
    assert all(row["scores"] == {"accuracy": 0.0} and isinstance(row["text"], str) for row in answers)
    saved = load_config(run / "config.yaml", CotTrainConfig)
    assert saved.steps == 2 and saved.output_dir == str(run)
    assert not list(run.rglob("training_args.bin"))
    assert main(["cot", "heatmap", "--model", str(run / "policy"), "--out", str(tmp_path / "page.html")]) == 0


def test_overwrite_and_resume(tiny, tmp_path, capsys):
    once = command(tiny, tmp_path, "--save_every", "1", "--eval.num_questions", "0")
    assert main(once) == 0
    assert main(once) == 2 and "already holds files; add --resume" in capsys.readouterr().err
    again = ["cot", "train", "--output_dir", str(tmp_path / "run"), "--resume", "--steps", "3"]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*again, "--credit.contrast", "abs", "--seed", "5"]) == 2
    told = capsys.readouterr().err
    assert 'was made with other settings: credit.contrast "k3" → "abs"; seed 0 → 5; go on with the old ones' in told
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    settings = tmp_path / "run" / "config.yaml"
    original = settings.read_text()
    settings.write_text(original.replace("group_size: 2", "group_size: 4"))
    assert main(again) == 2 and "made with other settings: group_size 2 → 4; go on" in capsys.readouterr().err
    settings.write_text(original)
    assert main(again) == 0
    assert "steps 2 → 3: what comes is not exactly what would have come" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "after 3 steps of guidance_gcpo" in card(tmp_path)
    finished = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*once, "--overwrite", "--trl", '{"num_generations": 1}']) == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == finished
    assert main([*once, "--overwrite"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def card(tmp: Path) -> str:
    return (tmp / "run" / "policy" / "README.md").read_text()


def test_a_run_without_a_checkpoint_starts_again(tiny, tmp_path):
    once = command(tiny, tmp_path, "--eval.num_questions", "2")
    assert main(once) == 0
    (tmp_path / "run" / "policy" / "README.md").unlink()
    assert main([*once, "--resume"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert "| held-out accuracy | 0.000 ± 0.000 | 0.000 ± 0.000 |" in card(tmp_path)


def test_gold_on_some_questions_is_said_once(tiny, tmp_path, caplog, capsys):
    assert main(command(tiny, tmp_path, "--algorithm", "gold_gcpo")) == 0
    said = [record.message for record in caplog.records if "'gold'" in record.message]
    assert said == ["2 of 3 prompts have no 'gold'; their groups stay as they are"]


def test_two_processes_with_a_group_that_both_have_a_part_of(tiny, tmp_path):
    """3 questions × 4 answers, 6 in each process: all groups fail and get one reference each, so 3 of 12 rewards are 1."""
    golds = ["two plus three is five. answer: 5", "nine minus one is eight. answer: 8", "answer: 8"]
    rows = [{**row, "gold": gold} for row, gold in zip(ROWS, golds, strict=True)]
    sizes = ["--questions_per_step", "3", "--group_size", "4", "--algorithm", "gold_gcpo", "--credit.rule", "guidance"]
    (done,) = ranks.make([ranks.run(command(tiny, tmp_path, *sizes, rows=rows))], tmp_path / "logs")
    assert done.codes == [0, 0], done.told
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert (row["gold/all_failed"], row["gold/injected"], row["gold/rejected"]) == (3, 3, 0)
        assert row["reward"] == 0.25 and row["gold/own_reward"] == 0
    assert len([path for path in tmp_path.rglob("policy") if path.is_dir()]) == 1


def test_a_reward_of_your_own(tiny, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def short(completions, **_):\n    return [-len(c[-1]['content']) / 100 for c in completions]\n")
    rows = [{"question": "Ann has two pens.", "answer": "a few"}, {"question": "Ben has six.", "answer": "more"}]
    assert main(command(tiny, tmp_path, "--reward", f"{path}:short", rows=rows)) == 0
    assert "held-out short after step 0: -0." in capsys.readouterr().out


# --- settings -------------------------------------------------------------------------------------------------------


def test_rows_in_the_words_of_trl():
    """GRPO weighs answers alike, DAPO tokens; clip ranges are the rows' own."""
    assert text_algorithm("grpo").trl == {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": 0.2,
    }
    assert text_algorithm("dapo").trl["loss_type"] == "dapo" and text_algorithm("dapo").trl["epsilon_high"] == 0.28
    gold = text_algorithm("gold_gcpo")
    assert gold.gold and gold.trl["importance_sampling_level"] == "sequence" and gold.trl["epsilon"] == 3e-4
    assert [text_algorithm(name).credit for name in ("guidance_gcpo", "random_credit", "entropy_credit")] == [
        "guidance",
        "random",
        "entropy",
    ]
    assert set(TEXT_ROWS) == {
        *("grpo", "dapo", "gspo", "guidance_gcpo", "random_credit", "entropy_credit", "gold_gcpo")
    }


def test_batch_arithmetic(tmp_path, monkeypatch):
    """6 questions × 4 answers over 2 processes in micro-batches of 3: 24 / 2 / 3 = 4 of them in each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = CotTrainConfig(questions_per_step=6, group_size=4, micro_batch_size=3, device="cpu", trl={"top_p": 0.9})
    settings = trl_settings(config, tmp_path)
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (3, 4)
    assert settings["num_generations"] == 4 and settings["top_p"] == 0.9


def test_shipped_configs_are_sound():
    found = sorted(Path("configs").glob("cot_*.yaml"))
    assert found
    for path in found:
        load_config(path, CotTrainConfig)


def test_the_range_of_trl_is_that_of_the_package():
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for extra in ("cot", "test"):
        assert f"trl{TESTED}" in project["optional-dependencies"][extra]


# --- what cannot be -------------------------------------------------------------------------------------------------


def with_rows(*rows: object) -> Callable[[Path, Path], list[str]]:
    return lambda tiny, tmp: command(tiny, tmp, rows=list(rows))


def with_options(*options: str) -> Callable[[Path, Path], list[str]]:
    return lambda tiny, tmp: command(tiny, tmp, *options)


def heatmap_with(*options: str) -> Callable[[Path, Path], list[str]]:
    return lambda tiny, tmp: ["cot", "heatmap", "--model", str(tiny), "--out", str(tmp / "page.html"), *options]


ONE = {"question": "Ann has two pens.", "answer": "2"}


def with_negatives(*given: object) -> Callable[[Path, Path], list[str]]:
    rows = [{**ONE, "bad": one} for one in given]
    return lambda tiny, tmp: command(tiny, tmp, "--negative_column", "bad", rows=rows)


CASES: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "group of one": (with_options("--group_size", "1"), "group_size must be at least 2, not 1"),
    "template without question": (
        with_options("--negative_template", "Answer wrongly."),
        "negative_template 'Answer wrongly.' has no {question}",
    ),
    "prompt without question": (
        with_options("--prompt_template", "Answer."),
        "prompt_template 'Answer.' has no {question}",
    ),
    "answer in words": (
        with_rows(ONE, {**ONE, "answer": "a lot"}),
        "questions.jsonl, line 2: the answer 'a lot' cannot be read as a number",
    ),
    "empty answer": (with_rows({**ONE, "answer": ""}), "line 1: the answer '' cannot be read as a number"),
    "no answer": (with_rows({"question": "Ann?"}), 'line 1: no "answer" among its keys (question)'),
    "no question": (
        with_rows({"prompt": "Ann?", "answer": "1"}),
        'line 1: no "question" among its keys (prompt, answer)',
    ),
    "empty question": (with_rows({**ONE, "question": " "}), 'line 1: "question" must be a text that is not empty'),
    "gold of another kind": (with_rows({**ONE, "gold": 3}), 'line 1: "gold" must be a text or null, got 3'),
    "column of TRL": (with_rows({**ONE, "prompt": "x"}), 'rename the column "prompt", TRL uses that name'),
    "not JSON": (with_rows(ONE, "{"), "line 2: not valid JSON"),
    "not an object": (with_rows("[1]"), "line 1: expected an object"),
    "no gold at all": (
        lambda tiny, tmp: command(tiny, tmp, "--algorithm", "gold_gcpo", rows=[ONE]),
        "no question of",
    ),
    "too few questions": (with_rows(ONE), "questions.jsonl' has 1 questions, and every rollout asks 2 different ones"),
    "no file": (with_options("--train_data", "none.jsonl"), "question file 'none.jsonl' does not exist"),
    "unknown set": (
        with_options("--train_data", "arithmetic:tain"),
        "questions 'arithmetic:tain' are unknown; did you mean 'arithmetic:train'?",
    ),
    "other suffix": (
        with_options("--train_data", "x.csv"),
        "expected a .jsonl file, hf:DATASET, or one of arithmetic:train",
    ),
    "algorithm of images": (with_options("--algorithm", "critical_gcpo"), "'critical_gcpo' reads the codes of images"),
    "unknown algorithm": (with_options("--algorithm", "grop"), "unknown algorithm 'grop'; did you mean 'grpo'?"),
    "credit of images": (with_options("--credit.contrast", "exact_kl"), "needs exact_kl, which texts do not have"),
    "uneven micro-batches": (
        with_options("--micro_batch_size", "3"),
        "micro_batch_size 3 does not divide the 4 answers",
    ),
    "unknown setting of TRL": (
        with_options("--trl", '{"use_vlm": true}'),
        "trl: GRPOConfig has no 'use_vlm'; did you mean 'use_vllm'?",
    ),
    "impossible setting of TRL": (with_options("--trl", '{"generation_batch_size": 7}'), "generation_batch_size"),
    "group of one by TRL's name": (
        with_options("--trl", '{"num_generations": 1}'),
        "at least 2 generations per prompt",
    ),
    "setting that the trainer refuses last": (with_options("--trl", '{"sync_ref_model": true}'), "set `beta` to a non"),
    "unknown negative column": (
        with_options("--negative_column", "bad"),
        "questions.jsonl', which has question, answer, gold; name one of these, or add it",
    ),
    "empty cell of a negative column": (
        with_negatives("Ann has six.", "Ann has ten.", None),
        "questions.jsonl, line 3: negative_column 'bad' is empty; give every row a negative prompt, or drop the setting",
    ),
    "row without the negative column": (
        lambda tiny, tmp: command(tiny, tmp, "--negative_column", "bad", rows=[{**ONE, "bad": "Ann has six."}, ONE]),
        "questions.jsonl, line 2: negative_column 'bad' is empty",
    ),
    "negative prompt of blanks": (with_negatives(" "), "line 1: negative_column 'bad' is empty"),
    "negative prompt of another kind": (
        with_negatives("Ann has six.", 6),
        "line 2: negative_column 'bad' must be a text, or messages with role and content, got 6",
    ),
    "negative prompts of two kinds": (
        with_negatives("Ann has six.", [{"role": "user", "content": "Ann has ten."}]),
        "questions.jsonl' has values of different kinds (Expected bytes, got a 'list' object); make them all texts",
    ),
    "messages without a role": (
        with_negatives([{"content": "Ann has six."}]),
        "line 1: negative_column 'bad' must be a text, or messages with role and content, got [{'content'",
    ),
    "no model": (with_options("--model", "nowhere"), "no folder 'nowhere'; arithmetic is the model that ships"),
    "no reward": (with_options("--reward", "nowhere.py:f"), "no such file"),
    "resume of nothing": (with_options("--resume"), "holds no run to resume"),
    "heatmap: template": (heatmap_with("--negative_template", "Wrong."), "has no {question}"),
    "heatmap: unknown words": (heatmap_with("--prompt", "Zoe has two cats."), "does not know: Zoe, cats"),
    "heatmap: empty": (heatmap_with("--prompt", " "), "the prompt is empty"),
    "heatmap: answer": (heatmap_with("--answer", "lots"), "--answer 'lots' cannot be read as a number"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(case, tiny, tmp_path, monkeypatch, capsys):
    arguments, message = CASES[case]
    given = arguments(tiny, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("gcpo-t2i: error: ") and message in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "page.html").exists()
    assert "Traceback" not in out + err


def test_a_refused_run_takes_away_the_folders_that_it_made_and_no_others(tiny, tmp_path):
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    refused = command(tiny, tmp_path, "--trl", '{"sync_ref_model": true}', "--output_dir", str(inner))
    assert main(refused) == 2 and not outer.exists()
    outer.mkdir()
    assert main(refused) == 2 and outer.is_dir() and not inner.exists()
    inner.mkdir()
    assert main(refused) == 2 and inner.is_dir()


@pytest.mark.parametrize("version", ["1.14.1", "1.15.0", "1.17.0", "0.9"])
def test_another_trl(version, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert main(command(tiny, tmp_path)) == 2
    assert (
        f"trl {version} is installed, and the trainer is tested with trl {TESTED}; pip install"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_no_trl(tiny, tmp_path, monkeypatch, capsys):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(command(tiny, tmp_path)) == 2
    assert capsys.readouterr().err == (
        "gcpo-t2i: error: training on texts needs trl, which is not installed; pip install 'gcpo-t2i[cot]'\n"
    )
    with pytest.raises(ValueError, match="not installed"):
        from gcpo_t2i.cot import GuidanceGRPOTrainer  # noqa: F401


def test_no_package_for_a_setting_of_trl(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: False)
    assert main(command(tiny, tmp_path, "--trl", '{"use_vllm": true}')) == 2
    assert "gcpo-t2i: error: vLLM is not available" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_config_with_the_settings_of_images_names_the_file(tiny, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"guidance": 3}))
    assert main(["cot", "train", "--config", str(path)]) == 2
    assert "mine.yaml" in capsys.readouterr().err


# --- questions ------------------------------------------------------------------------------------------------------


def test_missing_columns_are_null_and_answers_are_texts(tmp_path):
    assert load_questions(jsonl(tmp_path, ROWS)) == [
        ROWS[0],
        {**ROWS[1], "gold": None},
        {**ROWS[2], "answer": "8"},
    ]


def test_questions_of_a_data_set(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"question": "Ann?", "answer": "so\n#### 1", "level": 2}]).save_to_disk(tmp_path / "set")
    assert load_questions(f"hf:{tmp_path / 'set'}") == [{"question": "Ann?", "answer": "so\n#### 1", "level": 2}]
