"""The fenced blocks of a guide, and what the comment before a block says about it.

    <!-- test: run -->          the block is run, in the order of the guide, on a tiny model with few tokens
    <!-- test: file NAME -->    the block is the content of a file that later blocks read
    <!-- test: show -->         commands of other tools: split as a shell would, nothing more

A block of `sh` or `python` without a comment is checked: commands and recipes must parse, code must compile.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
_BLOCK = re.compile(r"(?:<!-- test: (?P<what>[^>]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    what: str  # run, show, check, or file NAME
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """The commands of a shell block as words, comments left out, lines that end in a backslash joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(guide: Path) -> list[Block]:
    return [Block(m["what"] or "check", m["language"], m["text"]) for m in _BLOCK.finditer(guide.read_text())]
