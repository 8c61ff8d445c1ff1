from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_precision() -> Iterator[None]:
    """float32 also on a CPU where `dtype: auto` takes bfloat16: the numbers of a test are the same anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcpo_t2i.run.multiplies_bfloat16", lambda device: device.type == "cuda")
        yield


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
