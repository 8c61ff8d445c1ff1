"""Everything that can be wrong with what a user gives: from the command line, one line each, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from filelock import FileLock
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from gcpo_t2i.cli import main
from tests.tiny import train_command


@dataclass(frozen=True)
class Place:
    """Where a case may write, and what it can use."""

    tmp: Path
    model: Path  # a policy of random weights; copy it to damage it
    rewards: Path  # a file of rewards
    finished: Path  # a run of 2 steps with checkpoint-1 and checkpoint-2; ours to damage
    locks: list[FileLock] = field(default_factory=list)

    def file(self, name: str, content: str | bytes) -> str:
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def train(self, *options: str) -> list[str]:
        return [*base(self.model, self.rewards, self.tmp), *options]

    def config(self, content: str | bytes) -> list[str]:
        return self.train("--config", self.file("my.yaml", content))

    def prompts(self, name: str, content: str | bytes) -> list[str]:
        return self.train("--train_prompts", self.file(name, content))

    def gold(self, gold: object, *options: str) -> list[str]:
        """A run that wants references, of one prompt that has this one."""
        line = json.dumps({"prompt": "a red circle", "gold": gold})
        return [*self.prompts("gold.jsonl", line), "--algorithm", "gold_gcpo", "--success_reward", "1", *options]

    def picture(self, name: str, side: int) -> str:
        Image.new("RGB", (side, side)).save(self.tmp / name)
        return name

    def reward(self, name: str) -> list[str]:
        return self.train("--rewards", json.dumps([{"name": name}]))

    def resume(self, *options: str) -> list[str]:
        return ["train", "--output_dir", str(self.finished), "--resume", *options]

    def damaged(self, name: str, damage: Callable[[Path], object], *options: str) -> list[str]:
        damage(self.finished / name)
        return self.resume(*options)

    def model_with(self, name: str, damage: Callable[[Path], object]) -> list[str]:
        model = Path(shutil.copytree(self.model, self.tmp / "model"))
        damage(model / name)
        return self.train("--model", str(model))


def base(model: Path, rewards: Path, folder: Path) -> list[str]:
    """A run of two steps with a checkpoint after each."""
    small = ["--group_size", "2", "--steps", "2", "--save_every", "1", "--eval.num_prompts", "2"]
    return [*train_command(model, rewards, folder), *small, "--eval.samples_per_prompt", "1"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def edit(**changes: object) -> Callable[[Path], object]:
    """Changes top-level keys of a JSON or YAML file."""

    def apply(path: Path) -> None:
        content = {**yaml.safe_load(path.read_text()), **changes}
        path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))

    return apply


def other_model(path: Path) -> None:
    save_file({**load_file(path), "trunk.norm.weight": torch.ones(3)}, path)


def in_use(place: Place) -> list[str]:
    lock = FileLock(place.finished / ".lock", timeout=0)
    lock.acquire()
    place.locks.append(lock)
    return place.resume()


def no_network(name: str, **_: object) -> str:
    if name.endswith("gated"):
        raise GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))
    raise LocalEntryNotFoundError("no")


OUT_OF_RANGE = """
def score(images, prompts):
    return [7.0] * len(images)
score.range = (0.0, 1.0)
"""

CASES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    # --- settings
    "unknown command": (lambda p: ["trian"], "unknown command 'trian'; did you mean 'train'?"),
    "unknown option": (lambda p: p.train("--stpes", "3"), "unknown option '--stpes'; did you mean '--steps'?"),
    "unknown algorithm": (
        lambda p: p.train("--algorithm", "gpco"),
        "algorithm 'gpco' is unknown; did you mean 'guidance_gcpo', 'gold_gcpo' or",
    ),
    "unknown contrast": (lambda p: p.train("--credit.contrast", "k4"), "credit.contrast 'k4' is unknown"),
    "a word for a number": (lambda p: p.train("--steps", "many"), "steps"),
    "no value": (lambda p: p.train("--steps"), "--steps needs a value"),
    "out of bounds": (lambda p: p.train("--optim.learning_rate", "-1"), "optim.learning_rate must be > 0, not -1"),
    "not finite": (lambda p: p.train("--guidance", "nan"), "guidance: 'nan' is not a number"),
    "betas": (lambda p: p.train("--optim.betas", "[0.9, 1.0]"), "optim.betas must be in [0, 1)"),
    "group of one": (lambda p: p.train("--group_size", "1"), "group_size 1 leaves no group"),
    "KL weights without KL": (
        lambda p: p.train("--loss.beta", "0", "--loss.kl_reweight"),
        "loss.kl_reweight changes the KL term, which needs loss.beta > 0",
    ),
    # --- references
    "no reference at all": (lambda p: p.gold(None), "gold.jsonl: no prompt has a reference; add the column"),
    "no reference there": (lambda p: p.gold("no.png"), "gold.jsonl, line 1: gold: image"),
    "reference that is no image": (
        lambda p: p.gold(Path(p.file("text.png", "hello")).name),
        "cannot be read as a picture",
    ),
    "reference of another size": (
        lambda p: p.gold(p.picture("big.png", 64)),
        "gold.jsonl, line 1: gold 'big.png' has 64 × 64 pixels, the model's images have 16 × 16; scale it",
    ),
    "reference that is neither": (lambda p: p.gold(7), "must be the path of a picture or a list of codes, got 7"),
    "reference with too few codes": (lambda p: p.gold([1, 2]), "gold has 2 codes, the model's images have 16"),
    "reference with unknown codes": (lambda p: p.gold([32] * 16), "gold has the code 32, the model's are 0 to 31"),
    "references and a group of one": (lambda p: p.gold([1] * 16, "--group_size", "1"), "group_size 1 leaves no group"),
    "nobody knows what is right": (
        lambda p: p.train("--algorithm", "gold_gcpo"),
        "asks which images are right, and no reward says so (bright); give --success_reward",
    ),
    "success that is no number": (
        lambda p: p.train("--success_reward", "nan"),
        "success_reward: 'nan' is not a number",
    ),
    "tag that is not there": (lambda p: p.train("--train_mix", '{"a": 1}'), "train_mix {'a': 1} must give numbers"),
    "parts that cut a group": (
        lambda p: p.train("--group_size", "8", "--rollout_batch_size", "12"),
        "rollout_batch_size 12 is no multiple of group_size 8, and groups are sampled whole; use 16",
    ),
    "parts smaller than a group": (lambda p: p.train("--group_size", "8", "--rollout_batch_size", "3"), "whole; use 8"),
    "device that is not there": (lambda p: p.train("--device", "cuda:77"), "device 'cuda:77' is not there"),
    "tracker that is unknown": (lambda p: p.train("--log.report_to", "[mlflow]"), "report_to"),
    # --- settings files
    "no settings file": (lambda p: p.train("--config", "no.yaml"), "no.yaml: no such file"),
    "unknown key": (lambda p: p.config("step: 3\n"), "my.yaml: unknown key 'step'; did you mean 'steps'?"),
    "repeated key": (lambda p: p.config("steps: 3\nseed: 1\nsteps: 4\n"), "line 3: the key 'steps' is there twice"),
    "broken YAML": (lambda p: p.config("steps: 3\n  seed: 1\n"), "my.yaml, line 2"),
    "a list of settings": (lambda p: p.config("- steps\n"), "my.yaml: expected lines like 'steps: 40', got a list"),
    "settings that are no text": (lambda p: p.config(b"\xff\xfe\x00"), "my.yaml: not UTF-8"),
    "settings with a word for a number": (lambda p: p.config("steps: many\n"), "my.yaml: "),
    "settings out of bounds": (
        lambda p: p.config("micro_batch_size: 0\n"),
        "my.yaml: micro_batch_size must be > 0, not 0",
    ),
    # --- prompts
    "no prompt file": (lambda p: p.train("--train_prompts", "no.txt"), "prompt file 'no.txt' does not exist"),
    "folder of prompts": (lambda p: p.train("--train_prompts", str(p.tmp)), "the suffix '' is not supported"),
    "table of prompts": (lambda p: p.prompts("a.csv", "a,b"), "the suffix '.csv' is not supported"),
    "empty prompts": (lambda p: p.prompts("a.txt", "\n \n"), "a.txt' is empty; write one prompt per line"),
    "prompts in Latin-1": (lambda p: p.prompts("a.txt", b"a\nb\xe9\n"), "byte 0xe9 at offset 3 (line 2)"),
    "broken JSON": (
        lambda p: p.prompts("a.jsonl", '{"prompt": "a"}\n{"prompt": \n'),
        "a.jsonl, line 2: not valid JSON",
    ),
    "JSON list": (lambda p: p.prompts("a.jsonl", "[1]\n"), "a.jsonl, line 1: expected an object"),
    "no prompt in JSON": (
        lambda p: p.prompts("a.jsonl", '{"text": "a"}\n'),
        'line 1: no "prompt" among its keys (text)',
    ),
    "number for a prompt": (lambda p: p.prompts("a.jsonl", '{"prompt": 3}\n'), 'line 1: "prompt" must be a text'),
    "reserved column": (lambda p: p.prompts("a.jsonl", '{"prompt": "a", "images": 1}\n'), 'rename the column "images"'),
    "line of 1 MB": (lambda p: p.prompts("a.txt", "a\n" + "b" * 2**20), "line 2: a prompt of 1,048,576 characters"),
    # --- rewards
    "unknown reward": (lambda p: p.reward("clop"), "reward 'clop' is unknown; did you mean 'clip'?"),
    "reward file that is not there": (lambda p: p.reward("no.py:score"), "no.py"),
    "reward that is not in its file": (lambda p: p.reward(f"{p.rewards}:brihgt"), "brihgt"),
    "reward that raises": (
        lambda p: p.reward(f"{p.rewards}:broken"),
        "broken' raised RuntimeError: the GPU caught fire",
    ),
    "NaN reward": (lambda p: p.reward(f"{p.rewards}:nan"), "nan' returned nan for image 0: not finite"),
    "too few scores": (lambda p: p.reward(f"{p.rewards}:short"), "short' returned 3 scores, expected 4"),
    "reward out of range": (
        lambda p: p.reward(f"{p.file('far.py', OUT_OF_RANGE)}:score"),
        "score' returned 7.0 for image 0: outside its range [0, 1]",
    ),
    "reward that applies to nothing": (
        lambda p: p.reward("geneval"),
        "reward 'geneval' applies to none of the prompts",
    ),
    "number of objects in words": (
        lambda p: [
            *p.prompts("a.jsonl", '{"prompt": "two stars", "include": [{"class": "star", "count": "two"}]}\n'),
            *("--rewards", '[{"name": "geneval"}]'),
        ],
        "a.jsonl, line 1: reward 'geneval': GenEval clause {'class': 'star', 'count': 'two'}: 'count' must be a whole number",
    ),
    # --- models
    "no model": (lambda p: p.train("--model", "nowhere"), "nowhere"),
    "damaged weights": (lambda p: p.model_with("trunk/model.safetensors", cut), "trunk"),
    "model of another library": (lambda p: p.model_with("model_index.json", edit(_class_name="FluxPipeline")), "Flux"),
    "model of the hub without network": (
        lambda p: p.train("--model", "owner/Janus"),
        "config.json of that repository of the Hugging Face hub is not on this machine, and the hub cannot be reached; "
        "where there is a network: hf download owner/Janus ",
    ),
    "gated model": (
        lambda p: p.train("--model", "owner/gated"),
        "wants terms to be accepted, at https://huggingface.co/owner/gated; then: hf auth login && hf download",
    ),
    "adapters for nothing": (
        lambda p: p.train("--lora.rank", "2", "--lora.targets", "[qproj]"),
        "lora.targets: 'qproj' matches no linear layer of the trunk; did you mean 'q_proj'?",
    ),
    # --- run folders
    "existing run": (
        lambda p: p.train("--output_dir", str(p.finished)),
        "already holds files; add --resume to go on with it, --overwrite to replace it, or name another",
    ),
    "folder of the user's": (
        lambda p: p.train("--output_dir", str(Path(p.file("thesis.tex", "1")).parent), "--overwrite"),
        "holds the current folder; name one that may be deleted",
    ),
    "another folder of the user's": (
        lambda p: p.train("--output_dir", str(p.finished / "samples"), "--overwrite"),
        "holds files that no run wrote; --overwrite only replaces runs",
    ),
    "file for a folder": (lambda p: p.train("--output_dir", str(p.rewards)), "is a file; name another folder"),
    "resume nothing": (lambda p: p.train("--resume"), "holds no run to resume"),
    "resume and overwrite": (lambda p: p.resume("--overwrite"), "resume and overwrite exclude each other"),
    "resume what": (lambda p: ["train", "--resume"], "resume which run? Name its folder with --output_dir"),
    "run in use": (in_use, "is in use by another process"),
    # --- checkpoints
    "truncated weights": (
        lambda p: p.damaged("checkpoint-2/model.safetensors", cut),
        "checkpoint-2: the checkpoint cannot be read",
    ),
    "truncated optimizer": (
        lambda p: p.damaged("checkpoint-2/optimizer.pt", cut),
        "delete it to go on from the one before",
    ),
    "missing random numbers": (lambda p: p.damaged("checkpoint-2/random.pt", Path.unlink), "cannot be read"),
    "truncated state": (lambda p: p.damaged("checkpoint-2/state.json", cut), "the checkpoint cannot be read"),
    "newer checkpoint": (
        lambda p: p.damaged("checkpoint-2/state.json", edit(format=99, version="9.0")),
        "written by a newer gcpo-t2i (9.0, format 99; this one reads format 3)",
    ),
    "checkpoint of another model": (
        lambda p: p.damaged("checkpoint-2/model.safetensors", other_model),
        "checkpoint-2: it is of another model: 'trunk.norm.weight' and 0 more tensors",
    ),
    "contradicting option": (lambda p: p.resume("--algorithm", "grpo"), 'algorithm "guidance_gcpo" → "grpo"'),
    "settings edited by hand": (
        lambda p: p.damaged("config.yaml", edit(seed=5)),
        "seed 0 → 5; go on with the old ones",
    ),
    "settings edited badly": (lambda p: p.damaged("config.yaml", edit(sede=5)), "config.yaml: unknown key 'sede'"),
    "fewer steps": (lambda p: p.resume("--steps", "1"), "steps 1 is less than the 2 steps that were made"),
    # --- other commands
    "prompt and prompts": (lambda p: ["sample", "--prompt", "a", "--prompts", "b.txt"], "give either --prompt"),
    "no prompt": (lambda p: ["sample"], "give either --prompt"),
    "samples in the way": (
        lambda p: ["sample", "--model", str(p.model), "--prompt", "a", "--out", str(p.finished)],
        "already holds files; add --overwrite to replace it",
    ),
    "stage without the one before": (
        lambda p: ["pretrain", "--stage", "generator", "--output_dir", str(p.tmp / "new")],
        "vq",
    ),
    "results that are none": (lambda p: ["eval", "--results", str(p.finished)], "recipe.json"),
    "images that are none": (lambda p: ["eval", "--images", str(p.finished)], "run"),
    "processes that do not divide": (
        lambda p: ["plan", "--processes", "3"],
        "prompts_per_step 8 cannot be split evenly",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, reward_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main(base(tiny_folder, reward_file, folder)) == 0
    return folder / "run"


@pytest.fixture
def place(
    tmp_path: Path, tiny_folder: Path, reward_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    run = tmp_path / "finished" / "run"
    shutil.copytree(finished, run)
    place = Place(tmp_path, tiny_folder, reward_file, run)
    yield place
    for lock in place.locks:
        lock.release()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_loses_nothing(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, message = CASES[name]
    command = prepare(place)
    before = contents(place.tmp)
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("gcpo-t2i: error: ") and told.count("\n") == 1
    assert message in told
    after = contents(place.tmp)
    assert before.items() <= after.items()


TOLERATED = {
    "byte order mark": b"\xef\xbb\xbfa red circle\na blue square\n",
    "Windows line ends": b"a red circle\r\na blue square\r\n",
    "blank lines": b"\n\na red circle\n\na blue square",
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_is_harmless_is_taken(name: str, place: Place) -> None:
    assert main(place.prompts("a.txt", TOLERATED[name])) == 0


def test_repeated_prompts_are_taken_and_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(place.prompts("a.txt", "a red circle\na blue square\na red circle\n")) == 0
    assert "1 of 3 prompts repeat others, such as 'a red circle'" in " ".join(capsys.readouterr().out.split())
