"""Lines of text that tokenizers get wrong: many scripts, combining marks, emoji, control characters, spaces."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

WORDS = (
    "the metric tensor A learns an operator; G_LM = a A_P + b_a of 1,234.56 don't e-mail http://x.y/z?q=1 C++ 3.14e-10"
).split()
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "☕️", "1️⃣", "🧑🏿‍🚀"]
SPACES = [" ", "  ", "\t", " \t ", "\u3000", "\xa0", "\r\n", "\u200b", "   "]
# Latin, marks, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Thai, Hangul jamo and syllables, punctuation,
# symbols, letterlike and enclosed characters, kana, CJK and its compatibility forms, presentation forms, half and full
# width, mathematical letters, pictographs, private use, surrogate neighbours, controls.
BLOCKS = [
    (0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F),
    (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF),
    (0x2000, 0x206F), (0x2070, 0x20CF), (0x2100, 0x218F), (0x2460, 0x24FF), (0x2500, 0x25FF), (0x3040, 0x30FF),
    (0x3200, 0x33FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE20, 0xFE2F),
    (0xFE30, 0xFEFF), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0xE000, 0xE0FF), (0xFFF0, 0xFFFF),
    (0x00, 0x1F), (0x7F, 0x9F),
]  # fmt: skip
FIXED = [
    "",
    " ",
    "   ",
    "\t",
    "\n",
    "▁",
    "▁▁ a ▁",
    "a\u0301",
    "\u0301",
    "\u1112\u1161\u11ab",
    "한",
    "שלום עולם",
    "مرحبا",
]


def varied_lines(count: int, seed: int = 0) -> list[str]:
    """`count` lines, the same for the same seed; none spells out a special piece."""
    generator = random.Random(seed)
    choose, number = generator.choice, generator.randint

    def char() -> str:
        return chr(number(*choose(BLOCKS)))

    def of_one_block() -> str:
        low, high = choose(BLOCKS)
        words = ("".join(chr(number(low, high)) for _ in range(number(1, 6))) for _ in range(number(1, 8)))
        return " ".join(word + choose(["", ",", ".", "!"]) for word in words)

    kinds: list[Callable[[], str]] = [
        lambda: " ".join(choose(WORDS) for _ in range(number(1, 20))),
        of_one_block,
        lambda: "".join(char() for _ in range(number(1, 20))),
        lambda: choose(SPACES).join(choose(WORDS + EMOJI) for _ in range(number(1, 12))),
        lambda: " " * number(0, 4) + str(number(0, 10**12)) + choose(SPACES) * number(0, 4),
        lambda: "".join(choose([*EMOJI, *"abc xyz"]) for _ in range(number(1, 10))),
        lambda: "".join(unicodedata.normalize(choose(["NFC", "NFD", "NFKD"]), char()) for _ in range(number(1, 12))),
    ]
    lines = list(FIXED)
    while len(lines) < count:
        line = choose(kinds)()
        if "[" not in line or "]" not in line:
            lines.append(line)
    return lines
