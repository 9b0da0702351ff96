"""What the pages point at is there: linked files and headings, the scripts, modules and configs of their commands."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from dcnv2_d2.config import find_config_file

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LINK = r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)"
FILE = r"(?:(?<![\w./])(?:configs|csrc|dcnv2_d2|docs|tests|tools)/[\w./-]+|(?<=python )\w+|(?<=uv run )\w+)\.\w+"

MODULE = r"-m (dcnv2_d2\.\w+)"
CONFIG = r"(?:--config-file |load_config\(\s*[\"']|_config\([\"'])((?:quick_start|COCO|paper)/\S+?\.yaml)"


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_at_is_there(page):
    text = page.read_text()
    links = [(page.parent / file if file else page, anchor) for file, anchor in re.findall(LINK, text)]
    files = [ROOT / file for file in re.findall(FILE, text)]
    assert [str(file) for file in (*files, *(file for file, _ in links)) if not file.exists()] == []
    assert [name for name in re.findall(MODULE, text) if find_spec(name) is None] == []
    for name in re.findall(CONFIG, text):
        find_config_file(name)  # raises
    assert [anchor for file, anchor in links if anchor and anchor not in anchors(file)] == []


def test_pages_are_read():
    """The patterns find what they are for."""
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(LINK, text)) > 20 and "train_net.py" in re.findall(FILE, text)
    assert "dcnv2_d2.train" in re.findall(MODULE, text) and len(re.findall(CONFIG, text)) == 3
