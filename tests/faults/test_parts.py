"""Parts that a run left are read within limits; what is wrong with one is a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import headscope as hs
from headscope.base import files
from headscope.errors import InputError
from headscope.retrieval import scan_grid, score_corpus
from headscope.sweeps import SweepConfig, run_sweep
from headscope.sweeps.store import Store


def swept(folder: Path) -> Callable[[], object]:
    """A sweep of two chunks, of which one is done."""
    config = SweepConfig.model_validate(
        {
            "name": "small",
            "models": ["tiny-gpt2"],
            "probes": [{"kind": "repeated_tokens", "length": 5, "batch": 2}],
            "edits": ["zero", "mean"],
            "metrics": ["loss"],
        }
    )
    run_sweep(config, folder, shard=(1, 2))
    store = Store.open(folder)
    return lambda: store.rows(store.plan())


def scanned(folder: Path) -> Callable[[], object]:
    """A needle grid of one cell."""
    model = hs.load("tiny-llama")
    again = lambda: scan_grid(  # noqa: E731
        model, 64, [0.5], folder=folder / "parts", per_cell=1, progress=False
    )
    again()
    return again


def ranked(folder: Path) -> Callable[[], object]:
    """A corpus of two documents in one part."""
    folder.mkdir(exist_ok=True)
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"text": "The cat slept. The cat slept."}\n{"text": "One day"}\n')
    again = lambda: score_corpus(hs.load(), corpus, ["L2H1"], folder, progress=False)  # noqa: E731
    again()
    return again


def claimed(file: Path) -> None:
    """Leave the file as it is: the limits are what changes."""


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def scrambled(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[4:60] = bytes(56)
    file.write_bytes(raw)


def bare(file: Path) -> None:
    parquet.write_table(pyarrow.table({"other": [1]}), file)


def words(file: Path) -> None:
    rows = parquet.read_table(file)
    parquet.write_table(pyarrow.table({n: ["x"] * len(rows) for n in rows.column_names}), file)


KINDS = {"sweep": swept, "grid": scanned, "corpus": ranked}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run") / "out"
    again = KINDS[request.param](folder)
    (part, *_) = sorted((folder / "parts").glob("*.parquet"))
    return part, part.read_bytes(), again


def test_d9_parts_are_read_within_limits(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part, whole, again = made
    part.write_bytes(whole)
    again()
    for name in ("MAX_ROWS", "MAX_VALUES", "MAX_BYTES"):
        with monkeypatch.context() as patched:
            patched.setattr(files, name, 0)
            with pytest.raises(InputError, match=r"claims [\d,]+ .*at most 0 are read here"):
                again()


@pytest.mark.parametrize("change", [cut, scrambled, bare, words])
def test_d9_a_damaged_part_is_named(made: Any, change: Callable[[Path], None]) -> None:
    part, whole, again = made
    part.write_bytes(whole)
    change(part)
    with pytest.raises(InputError, match=rf"{part.name} is damaged \(.*\): delete it, and run"):
        again()
    part.write_bytes(whole)


def test_d9_bits_of_another_shape_are_refused(tmp_path: Path) -> None:
    again = scanned(tmp_path)
    (part,) = (tmp_path / "parts").glob("*.parquet")
    rows = parquet.read_table(part).to_pylist()
    for shape in ([1 << 40], [-3], [0], [2, -1], []):
        rows[0]["copied_shape"] = shape
        parquet.write_table(pyarrow.Table.from_pylist(rows), part)
        with pytest.raises(InputError, match=r"is damaged .*copied"):
            again()


@pytest.mark.parametrize("ids", [b"[", b"5", b"\xff", b'{"a": 1}x'])
def test_d9_a_sweeps_table_with_damaged_metadata_is_named(ids: bytes, tmp_path: Path) -> None:
    swept(tmp_path)
    store = Store.open(tmp_path)
    facts = {b"headscope.chunks": ids}
    parquet.write_table(pyarrow.table({"x": [1]}).replace_schema_metadata(facts), store.table_file)
    with pytest.raises(InputError, match=r"table\.parquet is damaged"):
        store.done()
