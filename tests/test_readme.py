"""What README and docs quote is in the code, their links lead somewhere, both languages agree."""

import re

import pytest
from conftest import ROOT, command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    return re.findall(r"^```\w*\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_excerpts_are_lines_of_the_code(page):
    excerpt = r"<!-- from (\S+) -->\n```python\n(.*?)```"
    for name, code in re.findall(excerpt, page.read_text(encoding="utf-8"), re.S):
        assert code in (ROOT / name).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_lead_somewhere(page):
    text = re.sub("```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_worked_example_is_what_data_py_prints():
    printed = command("data.py")[1].splitlines()
    (example,) = [block for block in blocks(ROOT / "README.md") if "<- trained on" in block]
    assert [line for line in example.splitlines() if line not in [*printed, "..."]] == []


def test_the_chinese_readme_has_the_same_code():
    assert blocks(ROOT / "docs" / "README.zh.md") == blocks(ROOT / "README.md")
