"""The README can't drift: its code stands in the files, its worked example is what the command prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXCERPTS = re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", README, re.DOTALL)


def test_every_python_block_says_where_it_is_from():
    assert len(EXCERPTS) == README.count("```python") >= 3


@pytest.mark.parametrize("file, code", EXCERPTS)
def test_a_code_excerpt_stands_in_the_file(file, code):
    assert code in (ROOT / file).read_text(encoding="utf-8")


def test_the_worked_example_is_what_data_py_prints(tmp_path):
    printed = subprocess.run(
        [sys.executable, ROOT / "data.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    example = re.search(r"<!-- printed by data.py -->\n```\n(.*?)```", README, re.DOTALL).group(1)
    assert example in printed
    assert (tmp_path / "toy_data.png").stat().st_size > 1000


def test_the_test_command_is_the_one_that_ci_runs():
    assert "python -m pytest" in README
    assert "\npython -m pytest\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--[a-z][a-z-]+", README))))
def test_every_flag_in_the_readme_exists(flag):
    sources = "".join(
        (ROOT / name).read_text() for name in ("train.py", "llava_mini.py", "tests/bench.py", "tests/experiment.py")
    )
    assert f'"{flag}"' in sources or flag == "--nproc"  # torchrun's


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((docs/[^)]+|tests/[^)]+)\)", README))))
def test_every_picture_exists_and_is_small(link):
    Image.open(ROOT / link).verify()
    assert (ROOT / link).stat().st_size < 150_000


def test_the_help_names_every_flag_once(capsys):
    with pytest.raises(SystemExit):
        train.arguments().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{flag}" in text for flag in ("out", "text-fraction", "freeze", "init", "vision", "decoder"))
