"""The wheel and the sdist hold what they should, and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import headscope
from headscope.models import bundled

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "headscope"
MAX_WHEEL = 20 * 10**6

BUILD = """
import sys
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
list(WheelBuilder(sys.argv[1]).build(directory=sys.argv[2], versions=["standard"]))
list(SdistBuilder(sys.argv[1]).build(directory=sys.argv[2]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, str(ROOT), str(folder)], check=True)
    return folder


def test_wheel_is_whole_and_small(built: Path) -> None:
    (wheel,) = built.glob("headscope-*.whl")
    assert wheel.stat().st_size < MAX_WHEEL
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        packed = next(name for name in held if name.endswith(".dist-info/METADATA"))
        facts = message_from_bytes(archive.read(packed))
        entries = archive.read(packed.replace("METADATA", "entry_points.txt")).decode()
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= held
    for name in bundled.names():
        home = f"headscope/models/bundled/{name}"
        reads = "preprocessor_config.json" if name == "tiny-vit" else "tokenizer.json"
        for part in ("model.safetensors", "config.json", reads, "README.md"):
            assert f"{home}/{part}" in held
    assert "headscope/py.typed" in held
    assert all(name.startswith(("headscope/", "headscope-")) for name in held)
    assert not [name for name in held if name.endswith((".bin", ".pkl", ".pt", ".pyc"))]
    assert facts["Version"] == headscope.__version__
    assert "headscope = headscope.cli:main" in entries


def test_sdist_is_enough_to_test_and_document(built: Path) -> None:
    (sdist,) = built.glob("headscope-*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "CONTRIBUTING.md",
                 "LICENSE", "Makefile", "requirements.lock", "pyproject.toml", "docs/conf.py",
                 "tests/conftest.py", "notebooks/build.py", "configs/probes/ioi.yaml",
                 "headscope/py.typed"):  # fmt: skip
        assert name in held
    for unwanted in (".venv/", "runs/", "docs/_build/", "docs/generated/", ".git/"):
        assert not [name for name in held if name.startswith(unwanted)]
