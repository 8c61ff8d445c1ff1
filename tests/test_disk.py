"""A disk that fills up or turns read-only in mid-run: one line, and everything from before is still there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcpo_t2i.cli import main
from tests.test_resume import arguments, same_run

__all__ = ["arguments"]  # a fixture

# $1: where to mount; $2: what fits (kB); $3: "fill" or "lock", once there is a checkpoint; then the command
SCRIPT = """
mount -t tmpfs -o size=$2k tmpfs "$1" || exit 77
disk=$1 how=$3
shift 3
"$@" &
until ls "$disk"/run | grep -q '^checkpoint-[1-9]'; do sleep 0.01; kill -0 $! || break; done
if [ $how = fill ]; then head -c 1G /dev/zero > "$disk"/other 2> /dev/null
else mount --bind "$disk"/run "$disk"/run && mount -o remount,bind,ro "$disk"/run || kill -9 $!; fi
wait $!
code=$?
cp -r "$disk"/run "$disk".saved
exit $code
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a mount of its own")
@pytest.mark.parametrize(("how", "told"), [("fill", "No space left"), ("lock", "Read-only file system")])
def test_a_disk_that_fails_in_mid_run(arguments: list[str], tmp_path: Path, how: str, told: str) -> None:
    disk, saved = tmp_path / "disk", tmp_path / "disk.saved"
    disk.mkdir()
    run = ["--output_dir", str(disk / "run"), "--steps", "2000", "--optim.schedule", "constant"]
    command = ["unshare", "-rm", "bash", "-c", SCRIPT, "-", str(disk), "60000", how]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [*command, sys.executable, "-m", "gcpo_t2i", *arguments, *run], env=environment, capture_output=True, text=True
    )
    if done.returncode in (1, 77) and "gcpo-t2i" not in done.stderr:
        pytest.skip(f"no mount of its own: {done.stderr}")
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    step = max(int(path.name.removeprefix("checkpoint-")) for path in saved.glob("checkpoint-*"))
    assert main(["train", "--output_dir", str(saved), "--resume", "--steps", str(step + 2)]) == 0
    whole = ["--output_dir", str(tmp_path / "whole"), "--steps", str(step + 2), "--optim.schedule", "constant"]
    assert main([*arguments, *whole]) == 0
    same_run(tmp_path / "whole", saved)
