"""A real browser for pages; tests that need it are skipped where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass
class Opened:
    """A page, and what it said and asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium.

    It is started without its sandbox, since containers run tests as root; it only ever sees files
    that the tests wrote, and has no network.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium found on PATH")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=120_000
        )
        yield made
        made.close()


@contextmanager
def opened(
    made: Any, file: Path, *, width: int = 1300, height: int = 900, dark: bool = False, at: str = ""
) -> Iterator[Opened]:
    """One page of a file, offline."""
    context = made.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        offline=True,
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    found = Opened(page)
    page.on("console", lambda one: found.errors.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda one: found.requests.append(one.url))
    page.goto(file.resolve().as_uri() + at)
    yield found
    context.close()
