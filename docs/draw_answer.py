# SPDX-License-Identifier: Apache-2.0
"""Draw the table of the answer from the verdicts that the tests check.

``python docs/draw_answer.py`` puts it into ``docs/answer-to-1998.md``, between two comments. A test
fails if the page is not what this script would make of it.
"""

from pathlib import Path

from holdfast.spec.catalogue import STRATEGIES
from holdfast.spec.expected import EXPECTED, PLACES

PAGE = Path(__file__).with_name("answer-to-1998.md")
BEGIN = "<!-- table: generated from here -->"
END = "<!-- table: to here -->"


def keys() -> list[str]:
    """By letter, as the page explains them; combinations of several letters last."""
    return sorted(STRATEGIES, key=lambda key: (len(STRATEGIES[key].family), STRATEGIES[key].family))


def cell(text: str) -> str:
    """A verdict, in short: what breaks, in bold if memory is corrupted; what may wait for ever."""
    if not text:
        return "-"
    said, _, hangs = text.partition("; may hang: ")
    said = said.removeprefix("breaks ")
    if said.startswith("S1 "):
        said = f"**{said}**"
    return f"{said}; hangs {hangs}" if hangs else said


def table() -> list[str]:
    heads = [f"{profile}, {iommu}" for profile, iommu in PLACES]
    lines = ["|  | strategy | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for key in keys():
        kind = STRATEGIES[key]
        cells = [cell(EXPECTED.get((key, *place), "")) for place in PLACES]
        lines.append(f"| {kind.family} | `{key}`: {kind.title} | " + " | ".join(cells) + " |")
    return lines


def render(page: str) -> str:
    """The whole page, with the table as it is now. ValueError if the comments are not there."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"no {BEGIN} and {END} in the page")
    return "\n".join([f"{before}{BEGIN}", "", *table(), "", f"{END}{after}"])


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
