"""The Chinese pages say what the English ones say, section by section.

Compared are heading levels, fenced blocks, links, names in code font, and figures. Comments in
blocks and captions beside a column may be translated. ``test_docs.py`` runs the blocks and follows
the links of the English pages, and so, by equality, those of the Chinese ones.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = {
    "README.md": "README.zh.md",
    "docs/start.md": "docs/zh/start.md",
    "docs/slurm.md": "docs/zh/slurm.md",
}
ENGLISH = {chinese: english for english, chinese in PAIRS.items()}
PART = re.compile(r"^```(\w*)\n(.*?)^```|^(#+) ([^\n]+)", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FIGURE = re.compile(r"(?<![A-Za-z0-9.,-])\d+(?:[.,]\d+)*")
COMMENT = re.compile(r"(^|\s)\s*#(?!\s+kvdistill ).*", re.M)
HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass
class Section:
    level: int
    title: str
    prose: str = ""
    blocks: list[tuple[str, list[str]]] = field(default_factory=list)


def sections(text: str) -> list[Section]:
    found, end = [Section(0, "before the title")], 0
    for part in PART.finditer(text):
        language, code, level, title = part.groups()
        found[-1].prose += text[end : part.start()]
        end = part.end()
        if level:
            found.append(Section(len(level), title))
        else:
            lines = [line.rstrip() for line in COMMENT.sub("", code).splitlines()]
            found[-1].blocks.append((language, lines))
    found[-1].prose += text[end:]
    return found


def differences(english: str, chinese: str, page: str) -> list[str]:
    """Of the text of ``page`` in two languages: one line each, with the name of the section."""
    found = []
    for one, two in zip_longest(sections(english), sections(chinese)):
        if one is None or two is None or one.level != two.level:
            names = " and ".join(f"'{x.title}'" if x else "nothing" for x in (one, two))
            return [*found, f"{page}: heading levels out of step at {names}"]
        same = {
            "commands": same_blocks(one, two),
            "links": links(one, page) == links(two, PAIRS[page]),
            "names in code": set(CODE.findall(one.prose)) == set(CODE.findall(two.prose)),
            "tables": table(one) == table(two),
            "figures": figures(one.title + one.prose) == figures(two.title + two.prose),
            "translation": bool(HAN.search(two.prose)) or not one.prose.strip(),
        }
        if different := ", ".join(what for what, is_same in same.items() if not is_same):
            found.append(f"{page}: '{one.title}' / '{two.title}': {different} out of step")
    return found


def same_blocks(english: Section, chinese: Section) -> bool:
    """A line with Chinese in it counts up to its first gap: the rest is a caption."""
    return [x[0] for x in english.blocks] == [x[0] for x in chinese.blocks] and all(
        one == two or (HAN.search(two) and first_column(one) == first_column(two))
        for (_, ones), (_, twos) in zip(english.blocks, chinese.blocks, strict=True)
        for one, two in zip_longest(ones, twos, fillvalue="missing")
    )


def first_column(line: str) -> str:
    return re.split(r"\s{2,}", line.strip())[0]


def links(section: Section, page: str) -> list[str]:
    """Their targets; a Chinese page, whose anchors are its own, as the English one."""
    found = []
    for path, anchor in targets(section.prose, page):
        is_translated = path in PAIRS or path in ENGLISH
        found.append(ENGLISH.get(path, path) + ("" if is_translated else anchor))
    return sorted(found)


def targets(text: str, page: str) -> list[tuple[str, str]]:
    """Path from the root, or address, and ``#anchor`` of every link on ``page``."""
    found = []
    for target in LINK.findall(text):
        path, mark, anchor = target.partition("#")
        if "://" not in path:
            path = os.path.normpath(Path(page).parent / path) if path else page
        found.append((path, mark + anchor))
    return found


def table(section: Section) -> list[list[list[str]]]:
    """The figures in every cell of every row."""
    rows = [line for line in section.prose.splitlines() if line.startswith("|")]
    return [[figures(cell) for cell in row.split("|")] for row in rows]


def figures(text: str) -> list[str]:
    return sorted(FIGURE.findall(CODE.sub("", LINK.sub("]", text))))


@pytest.mark.parametrize("page", PAIRS)
def test_a_chinese_page_is_in_step_with_the_english_one(page: str) -> None:
    english, chinese = (ROOT / x for x in (page, PAIRS[page]))
    found = differences(english.read_text("utf-8"), chinese.read_text("utf-8"), page)
    assert not found, "\n".join([f"change {PAIRS[page]} as well:", *found])


@pytest.mark.parametrize("page", PAIRS)
def test_chinese_pages_link_to_chinese_pages(page: str) -> None:
    text = (ROOT / PAIRS[page]).read_text("utf-8")
    paths = {path for path, _ in targets(text, PAIRS[page])}
    assert paths & PAIRS.keys() <= {page}


ONE = """# Title
[Other](start.md#here) and [more](corpus.md#files).

## Run it
It takes 6 minutes with `fp16`.

```bash
kvdistill run a.yaml   # all of it
```

| size | time |
|---|---|
| 4 | 1.5 |
"""
TWO = """# 标题
[另一页](start.md)和[更多](../corpus.md#files)。

## 运行
用 `fp16` 需要 6 分钟。

```bash
kvdistill run a.yaml   # 全部
```

| 大小 | 时间 |
|---|---|
| 4 | 1.5 |
"""


@pytest.mark.parametrize(
    ("old", "new", "section", "what"),
    [
        ("", "", "", ""),
        ("run a.yaml", "run b.yaml", "Run it", "commands"),
        ("corpus.md#files", "corpus.md#rows", "Title", "links"),
        ("`fp16`", "`bf16`", "Run it", "names in code"),
        ("| 4 | 1.5 |", "| 1.5 | 4 |", "Run it", "tables"),
        ("6 minutes", "7 minutes", "Run it", "figures"),
        ("## Run it", "### Run it", "Run it", "heading levels"),
    ],
)
def test_what_is_out_of_step_is_named(old: str, new: str, section: str, what: str) -> None:
    found = differences(ONE.replace(old, new) if old else ONE, TWO, "docs/start.md")
    assert len(found) == bool(what)
    assert all(f"'{section}'" in line and what in line for line in found)


def test_a_section_left_in_english_is_named() -> None:
    left = TWO.replace("用 `fp16` 需要 6 分钟。", "It takes 6 minutes with `fp16`.")
    left = left.replace("| 大小 | 时间 |", "| size | time |")
    assert (
        "'Run it' / '运行': translation out of step" in differences(ONE, left, "docs/start.md")[0]
    )
