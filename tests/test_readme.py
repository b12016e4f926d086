"""The README can't drift: its code stands in the files, its worked example is what the command prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXCERPTS = re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", README, re.DOTALL)


def test_every_python_block_says_where_it_is_from():
    assert len(EXCERPTS) == README.count("```python") >= 3


@pytest.mark.parametrize("file, code", EXCERPTS)
def test_a_code_excerpt_stands_in_the_file(file, code):
    assert code in (ROOT / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """-> (what `python data.py` prints, the sheet that it writes)."""
    folder = tmp_path_factory.mktemp("worked")
    argv = [sys.executable, ROOT / "data.py"]
    printed = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True).stdout
    return printed, Image.open(folder / "toy_data.png")


def test_the_worked_example_is_what_data_py_prints(worked):
    assert re.search(r"<!-- printed by data.py -->\n```\n(.*?)```", README, re.DOTALL).group(1) in worked[0]


def test_the_sheet_shows_the_first_training_pictures_in_four_rows_of_eight(worked):
    toy = data.ToyDataset("train", 32, text_fraction=0.0, image_size=64)
    pictures = [toy.record(i)["image"][0] for i in range(32)]
    sheet = worked[1]
    assert sheet.size == (8 * 68, 4 * 68)
    for i, picture in enumerate(pictures):
        x, y = 68 * (i % 8), 68 * (i // 8)
        assert sheet.crop((x + 2, y + 2, x + 66, y + 66)).tobytes() == picture.tobytes()
        frame = [sheet.getpixel(at) for at in ((x, y), (x + 1, y + 1), (x + 66, y + 66), (x + 67, y + 67))]
        assert set(frame) == {(255, 255, 255)}


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
