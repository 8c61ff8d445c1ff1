from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A core for each worker: said before torch is imported, here and in what the tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
import torch

from gcpo_t2i import run


@pytest.fixture(autouse=True, scope="session")
def one_precision() -> Iterator[Callable[[torch.device], bool]]:
    """float32 also on a CPU where `dtype: auto` takes bfloat16: the numbers of a test are the same anywhere. Gives the function
    that says where it does."""
    multiplies_bfloat16 = run.multiplies_bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "multiplies_bfloat16", lambda device: device.type == "cuda")
        yield multiplies_bfloat16


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny policy. Read only."""
    from tests.tiny import write_tiny_policy

    return write_tiny_policy(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with custom rewards: bright, dark, broken, nan, short, constant."""
    from tests.tiny import BRIGHT

    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(BRIGHT)
    return path
