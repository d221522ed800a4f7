"""The READMEs: what they quote is the code, what they name exists."""

import re
import textwrap

import pytest
from conftest import ROOT

TEXTS = ["README.md", "README.zh-CN.md", "DETECTORS.md", "ckpt/shapes/README.md", "ckpt/shapes_mask/README.md",
         "ckpt/shapes_atss/README.md"]  # fmt: skip
READMES = TEXTS[:2]


def anchors(text):
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", READMES)
def test_quoted_code_is_the_code(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    # methods, a function, and the heart of another one
    places = (("detectors/faster_rcnn.py", 4), ("detectors/faster_rcnn.py", 0), ("postprocess.py", 8))
    for block, (file, indent) in zip(blocks[: len(places)], places):
        assert len(block.splitlines()) >= 4
        block = block.replace("\n\n\n", "\n\n")  # one line less between methods than between functions
        assert textwrap.indent(block, " " * indent) in (ROOT / file).read_text()


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", READMES)
def test_functions_that_are_named_exist(name):
    """Each [`function`](file.py) is defined there."""
    for functions, file in re.findall(r"\[((?:`\w+`[,、 ]*)+)\]\(([\w/]+\.py)\)", (ROOT / name).read_text()):
        for function in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^\s*(def|class) {function}\b", (ROOT / file).read_text(), flags=re.MULTILINE), function


def test_both_languages_say_the_same():
    """As many headings, pictures, rows of tables, and the same blocks of code."""
    english, chinese = ((ROOT / name).read_text() for name in READMES)
    for pattern in (r"^#+ ", r"^!\[", r"^\|", r"^```"):
        counts = [len(re.findall(pattern, text, flags=re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1], pattern
    pictures = [re.findall(r"^!\[.*\]\((.*)\)", text, flags=re.MULTILINE) for text in (english, chinese)]
    assert pictures[0] == pictures[1]
