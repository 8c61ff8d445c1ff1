"""`gcpo-t2i env`: what a bug report says about a machine, and what it must not say."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gcpo_t2i
from gcpo_t2i import env
from gcpo_t2i.cli import main


def test_the_command_prints_a_table_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "<details><summary>gcpo-t2i env</summary>" and lines[-1] == "</details>"
    assert f"| gcpo-t2i | version | {gcpo_t2i.__version__} |" in lines
    assert f"| torch | version | {torch.__version__} |" in lines
    assert all(line.count("|") == 4 for line in lines if line.startswith("|"))


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["system"]["python"].startswith(platform.python_version())
    assert found["settings"]["torch threads"] == str(torch.get_num_threads())
    assert found["gcpo-t2i"]["rewards package"] == "found"


def test_it_names_no_user_host_or_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home-of-ada"
    home.mkdir()
    monkeypatch.chdir(home)
    for name in ("HOME", "USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setattr(platform, "node", lambda: "adas-laptop")
    text = env.markdown(env.report())
    for private in ("ada", str(tmp_path), str(Path(gcpo_t2i.__file__).parent), str(Path.home())):
        assert private not in text


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.installed("no-such-package-of-ours") == "not installed"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert env.report()["settings"]["OMP_NUM_THREADS"] == "not set"
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    assert env.driver_version() == "nvidia-smi not found"
    monkeypatch.setitem(sys.modules, "rewards", SimpleNamespace(__file__="/somewhere/rewards.py"))
    assert env.report()["gcpo-t2i"]["rewards package"] == "shadowed by another package of that name"


def test_driver_version_comes_from_its_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.10\necho 570.10\n")
    tool.chmod(0o755)
    monkeypatch.setattr(env.shutil, "which", lambda name: str(tool))
    assert env.driver_version() == "570.10"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert env.driver_version() == "nvidia-smi fails"


def test_a_cpu_build_of_torch_has_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert env.torch_build() == {"version": torch.__version__, "build": "CPU only"}


def test_a_bar_in_a_value_does_not_break_the_table() -> None:
    assert "| a | b | x/y |" in env.markdown({"a": {"b": "x|y"}})
