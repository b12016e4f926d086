"""What a command of extras/ prints under torchrun, on two ranks: the rows of its tables."""

import subprocess

from conftest import ROOT, TORCHRUN


def printed(script):
    torchrun = [*TORCHRUN, ROOT / script]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return [line.split(" | ") for line in done.stdout.splitlines() if " | " in line]
