"""Commands in the guides: each is one that the command line takes, with options that exist and values that are allowed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gcpo_t2i.commands import COMMANDS
from gcpo_t2i.parsing import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.yaml"))]
PROGRAM = re.compile(r"(?:^|[ '])(?:gcpo-t2i|-m gcpo_t2i) (?=\w)")
ENDS = ("&&", "|", ";", "&")  # of a command of the shell


def shell(text: str, is_page: bool) -> str:
    """The lines for a shell: blocks of a page, or the head of a settings file."""
    if is_page:
        return "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    head = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    return "\n".join(line for line in head.replace("\\\n", " ").splitlines() if "--config" in line)


def commands(path: Path) -> list[list[str]]:
    """Arguments of each gcpo-t2i in the file, with something in the place of the shell's variables."""
    text = shell(path.read_text(encoding="utf-8"), path.suffix == ".md").replace("\\\n", " ")
    lists = dict(re.findall(r"^(\w+)='(.*)'$", text, re.M))  # geneval='[...]'
    found = []
    for line in text.splitlines():
        if not (start := PROGRAM.search(line)):
            continue
        said = re.sub(r"\s#.*", "", line[start.end() :])
        words = shlex.split(said.removesuffix("'") if said.count("'") % 2 else said)  # of bash -c '...'
        words = [lists.get(word[1:], "1") if word.startswith("$") else word for word in words]
        end = next((words.index(word) for word in words if word in ENDS), len(words))
        found.append(words[:end])
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_are_understood(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_run.yaml").write_text("seed: 0\n" if path.name != "rewards.md" else "rewards: [{name: clip}]\n")
    monkeypatch.chdir(tmp_path)
    for words in commands(path):
        name = next((name for size in (2, 1) if (name := " ".join(words[:size])) in COMMANDS), None)
        assert name, f"no command: gcpo-t2i {' '.join(words)}"
        command, options = COMMANDS[name], words[len(name.split()) :]
        if "--help" not in options and "..." not in options:
            parse(command.config, options, prog="gcpo-t2i", description="", also=command.also)


def test_commands_are_found() -> None:
    janus = [" ".join(words[:2]) for words in commands(ROOT / "docs" / "janus.md")]
    assert janus.count("train --config") == 3 and "prompts geneval" in janus and "rewards check" in janus
    assert commands(ROOT / "configs" / "janus_pro_1b_geneval.yaml")[0][:2] == ["train", "--config"]
    assert sum(len(commands(path)) for path in PAGES) > 80
