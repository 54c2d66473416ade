"""Reads the code out of Markdown pages."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CALL = re.compile(r"(headscope|make) ")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [body for name, body in found if name == language]


def commands(page: Path, language: str) -> list[list[str]]:
    """Calls of headscope or make in fenced blocks, split into words, comments left out."""
    lines = (line for body in blocks(page, language) for line in body.splitlines())
    calls = (shlex.split(line, comments=True) for line in lines if _CALL.match(line))
    return list(calls)
