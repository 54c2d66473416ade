"""What goes wrong around a sweep: full disks, damaged files, data that changed, wrong questions."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from headscope.base.files import whole_file
from headscope.errors import InputError
from headscope.sweeps import export, make_plan, read, run_sweep, status
from headscope.sweeps.results import intervals
from headscope.sweeps.run import ATTEMPTS, Bench, Benches
from headscope.sweeps.store import Store
from tests.sweeps.support import config, variants_run

FEW = {"sets": [{"name": "few", "heads": ["L0H0", "L1H1", "L2H2"]}], "chunk": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trouble") / "done"
    assert run_sweep(config(), out).compacted
    return out


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk that takes so many more files; the same results are not computed again for it."""
    found = {"left": 1, "tries": 0, "measured": 0}
    write, measure = parquet.write_table, Bench.measure

    def failing(*arguments: Any, **words: Any) -> None:
        if found["left"] <= 0:
            found["tries"] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        found["left"] -= 1
        write(*arguments, **words)

    def counting(*arguments: Any) -> Any:
        found["measured"] += 1
        return measure(*arguments)

    monkeypatch.setattr(parquet, "write_table", failing)
    monkeypatch.setattr(Bench, "measure", counting)
    return found


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path, full: dict[str, int]) -> None:
    with pytest.raises(
        InputError, match=r"cannot write .*No space left on device.*run the same command again"
    ):
        run_sweep(config(**FEW), tmp_path)
    assert (full["measured"], full["tries"]) == (2, ATTEMPTS)
    found = status(tmp_path)
    assert (found.done, found.pending, dict(found.failed)) == (1, 2, {})
    assert not list((tmp_path / "parts").glob(".*"))
    full["left"] = 2  # all parts, but no table
    with pytest.raises(InputError, match=r"cannot write .*table\.parquet"):
        run_sweep(config(**FEW), tmp_path)
    full["left"] = 1
    assert run_sweep(config(**FEW), tmp_path).compacted
    assert full["measured"] == 4


def test_a_disk_that_is_away_for_a_moment_is_tried_again(
    tmp_path: Path, full: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    full["left"] = 100
    replace, tries = Path.replace, iter(range(100))

    def shaky(self: Path, target: Path) -> Path:
        if target.suffix == ".parquet" and next(tries) < 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", shaky)
    assert run_sweep(config(**FEW), tmp_path).compacted
    assert full["measured"] == 3


def test_folders_that_cannot_be_synced_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on disks of the SMB kind."""
    sync = os.fsync

    def files_only(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with whole_file(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), whole_file(tmp_path / "other") as file:
        file.write(b"lost")


def test_damaged_files_are_named(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    shutil.copytree(finished, out)
    (out / "table.parquet").write_bytes(b"PAR1")
    for call in (read, status):
        with pytest.raises(InputError, match=r"table\.parquet is damaged"):
            call(out)
    out = tmp_path / "part"
    run_sweep(config(), out, shard=(1, 3))
    (part,) = out.glob("parts/*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"{part.name} is damaged.*delete"):
        read(out)


def test_data_that_changed_end_the_sweep(tmp_path: Path) -> None:
    """A probe is read from a file; the config stays the same when the file does not."""
    file = tmp_path / "texts.txt"
    file.write_text("one two three four five six. " * 8)
    probe = {"kind": "text", "file": str(file), "length": 8, "batch": 3}
    for name, wanted in (
        ("probe", config(probes=[probe])),
        ("reference", config(edits=[{"method": "mean", "reference": "text"}], references=[probe])),
    ):
        file.write_text("one two three four five six. " * 8)
        run_sweep(wanted, tmp_path / name, shard=(1, 3))
        file.write_text("six five four three two one. " * 8)
        with pytest.raises(
            InputError, match=r"'text'.* is not the one that this sweep was planned"
        ):
            run_sweep(wanted, tmp_path / name)
        assert status(tmp_path / name).done == 1


def test_single_heads_are_no_group(finished: Path) -> None:
    results = read(finished)
    with pytest.raises(InputError, match=r"'all' is arranged 'each': use scores\(\)"):
        results.effects("all")
    with pytest.raises(InputError, match="did you mean 'metric'"):
        results.table(metrc="loss")
    with pytest.raises(InputError, match="unknown model"):
        results.table(model="gpt2")


def test_sets_that_are_alike_are_run_once_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = variants_run(monkeypatch)
    curve = {"arrange": "cumulative", "steps": 1}
    sets = [{"name": f"c{i}", "random": "all", "seed": i, **curve} for i in range(4)]
    sets.append({"name": "pair", "heads": ["L2H0", "L0H1"], "arrange": "together"})
    run_sweep(config(sets=sets, chunk=64), tmp_path)
    assert max(run) == 3  # none, all, and the pair
    results = read(tmp_path)
    ends = [results.effects(f"c{i}").mean.tolist() for i in range(4)]
    assert ends.count(ends[0]) == 4
    assert ends[0][0][0] == 0 != ends[0][0][1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sets": [{"name": "s", "score": "entropy", "top": 13}]}, "top 13 .* 12"),
        ({"sets": [{"name": "s", "layers": [-1]}]}, "no heads in layer -1"),
        ({"sets": [{"name": "s", "layers": [3]}]}, "no heads in layer 3"),
    ],
)
def test_heads_that_there_are_not(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make_plan(config(**changes))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_have_a_range(seed: int) -> None:
    with pytest.raises(ValueError, match="seeds"):
        config(seeds=[seed])


def test_many_intervals_are_those_of_few(finished: Path) -> None:
    frame = read(finished)._frame
    many = frame.sample(3000, replace=True, random_state=0)
    low, high = intervals(many)
    for index in (0, 1500, 2999):
        one = intervals(many.iloc[[index]])
        assert (low[index], high[index]) == (one[0][0], one[1][0])
    assert np.isfinite(low).all()


def test_plans_of_many_cells_are_quick_to_read(tmp_path: Path) -> None:
    sets = [{"name": "many", "random": 3, "draws": 2000, "arrange": "together"}]
    wanted = config(sets=sets)
    benches = Benches(wanted)
    outcome = run_sweep(wanted, tmp_path, shard=(1, 500))
    assert outcome.done == outcome.total == 1
    found = status(tmp_path)
    assert (found.cells, found.cells_done, found.total) == (2000, 4, 500)
    assert make_plan(wanted, benches=benches) == Store(tmp_path).plan()
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    assert len(lines) < 20, "a key per line, the plan in one"
    assert json.loads("".join(lines))["name"] == "test"


def test_export_to_a_full_disk(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    from headscope.sweeps.results import WRITERS

    def failing(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setitem(WRITERS, "sqlite", failing)
    with pytest.raises(InputError, match="disk is full"):
        export(finished, "sqlite")
