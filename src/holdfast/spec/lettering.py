# SPDX-License-Identifier: Apache-2.0
"""Text for pictures: about how wide it is, in lines of a width, and safe inside XML.

Whoever looks at a picture has fonts of his own, so widths are rough and rather too large.
"""

from __future__ import annotations

import re
from html import escape
from typing import Final

SIZE: Final = 12
"""Of letters, in the units of the picture, where nothing else is said."""
_FOREIGN: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Not in XML 1.0, or of no use on a line."""


def measured(text: str, size: float = SIZE) -> float:
    """About how wide a text is, rather too much than too little."""
    units = 0.0
    for letter in text:
        if letter in "iljI.,:;'|!()[]ft- r":
            units += 0.42
        elif letter in "mwMW@%" or ord(letter) > 0x2FF:
            units += 1.0
        else:
            units += 0.74 if letter.isupper() else 0.62
    return units * size


def wrap(text: str, width: float, size: float = SIZE) -> list[str]:
    """The text in lines that are no wider; a word that is, is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while measured(word, size) > width and len(word) > 1:
            if line:
                lines.append(line)
                line = ""
            cut = next(n for n in range(len(word), 0, -1) if measured(word[:n], size) <= width
                       or n == 1)  # fmt: skip
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{line} {word}" if line else word
        if line and measured(longer, size) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    if line:
        lines.append(line)
    return lines


def clean(text: str) -> str:
    """Escaped, and without characters that XML does not have."""
    return escape(_FOREIGN.sub("\ufffd", text))
