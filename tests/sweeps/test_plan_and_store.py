"""Ids that say what is computed, and a folder that survives whatever happens to it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from headscope.errors import InputError
from headscope.models import bundled
from headscope.sweeps import make_plan
from headscope.sweeps.cluster import Waiting
from headscope.sweeps.plan import Chunk, Plan, plan_from_json, plan_json
from headscope.sweeps.run import Benches, manifest, passes_of_chunk
from headscope.sweeps.store import KEYS, Store
from tests.sweeps.support import REPEATED, config


@pytest.fixture(scope="module")
def benches() -> Benches:
    return Benches(config())


@pytest.fixture(scope="module")
def plan(benches: Benches) -> Plan:
    return make_plan(config(), benches=benches)


@pytest.fixture
def store(plan: Plan, tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "sweep")
    made.begin(manifest(config(), plan))
    return made


def ids(plan: Plan) -> set[str]:
    return {chunk.id for chunk in plan.chunks}


def test_a_plan_is_the_same_every_time_and_survives_json(plan: Plan) -> None:
    assert make_plan(config()) == plan
    assert plan_from_json(json.loads(json.dumps(plan_json(plan)))) == plan
    assert len(ids(plan)) == len(plan.chunks) == 3
    assert plan.n_cells == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"edits": ["mean"]},
        {"metrics": ["accuracy"]},
        {"probes": [REPEATED | {"seed": 1}]},
        {"models": [{"model": "tiny-gpt2", "revision": bundled.checkpoints("tiny-gpt2")[0]}]},
        {"models": ["tiny-llama"]},
        {"sets": [{"name": "other"}]},
    ],
    ids=str,
)
def test_another_computation_has_other_ids(plan: Plan, changes: dict[str, object]) -> None:
    assert not ids(plan) & ids(make_plan(config(**changes)))


def test_seeds_count_only_for_edits_that_draw(plan: Plan) -> None:
    assert ids(make_plan(config(seeds=[7]))) == ids(plan)
    drawn = make_plan(config(edits=["resample"], seeds=[0, 1]))
    assert [study.seed for study in drawn.studies] == [0, 1]
    assert len(ids(drawn)) == 6


def test_what_cannot_work_is_found_before_anything_runs() -> None:
    for changes, expected in (
        ({"edits": [{"method": "zero", "positions": "bos"}]}, "no mark"),
        ({"edits": ["patch"]}, "no corrupt pair"),
        ({"metrics": ["logit_difference"]}, "no foils"),
        ({"probes": [REPEATED | {"length": 500}]}, "tokens long"),
    ):
        with pytest.raises(InputError, match=expected):
            make_plan(config(**changes))


def test_what_is_not_computed_otherwise_keeps_its_ids(plan: Plan) -> None:
    more = make_plan(config(edits=["mean", "zero"], memory="1GB"))
    assert ids(plan) < ids(more)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_are_a_partition(plan: Plan, count: int) -> None:
    parts = [plan.shard(i + 1, count) for i in range(count)]
    assert sum(parts, ()) == plan.chunks
    with pytest.raises(InputError):
        plan.shard(count + 1, count)


def test_the_first_manifest_stands(store: Store, plan: Plan) -> None:
    other = make_plan(config(edits=["mean"]))
    store.begin(manifest(config(edits=["mean"]), other))
    assert store.plan() == plan
    assert "versions" in store.manifest()


def test_a_part_is_whole_or_absent(store: Store, plan: Plan, benches: Benches) -> None:
    chunk = plan.chunks[0]
    rows = benches.measure(plan, chunk)
    assert not store.has(chunk.id)
    store.commit(chunk.id, rows)
    store.commit(chunk.id, rows)  # a second writer of the same
    (store.path / "parts" / f".{plan.chunks[1].id}.parquet.0.tmp").write_bytes(b"PAR1 half")
    assert store.done() == {chunk.id}
    assert store.rows(plan).num_rows == 4
    assert not store.compact(plan)


def test_compaction_keeps_every_row_once_in_order(
    store: Store, plan: Plan, benches: Benches
) -> None:
    for chunk in reversed(plan.chunks):
        store.commit(chunk.id, benches.measure(plan, chunk))
    before = store.rows(plan)
    assert store.compact(plan)
    assert not list((store.path / "parts").iterdir())
    assert store.rows(plan).replace_schema_metadata(None).equals(before)
    assert store.done() == ids(plan)
    frame = before.to_pandas()
    assert not frame.duplicated(list(KEYS)).any()
    assert frame["heads"].tolist() == [
        str(head) for chunk in plan.chunks for cell in chunk.cells for head in cell.heads
    ]
    # A late writer of a chunk that is in the table already changes nothing.
    store.commit(plan.chunks[0].id, benches.measure(plan, plan.chunks[0]))
    assert store.rows(plan).num_rows == 12
    assert store.compact(plan)
    assert store.rows(plan).replace_schema_metadata(None).equals(before)


def test_failures_go_when_the_chunk_is_done(store: Store, plan: Plan, benches: Benches) -> None:
    chunk = plan.chunks[0]
    store.fail(chunk.id, ["first", "RuntimeError: at last"])
    assert store.failed() == {chunk.id: "RuntimeError: at last"}
    store.commit(chunk.id, benches.measure(plan, chunk))
    assert store.failed() == {}
    store.fail(chunk.id, ["too late"])
    assert store.failed() == {}


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no sweep"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a readable manifest"):
        Store.open(tmp_path).plan()
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format 99"):
        Store.open(tmp_path).plan()


def test_rows_hold_what_they_say(plan: Plan, benches: Benches) -> None:
    rows = benches.measure(plan, plan.chunks[0]).to_pandas()
    values = np.stack(rows["effects"].tolist())
    np.testing.assert_allclose(rows["effect"], values.mean(1))
    np.testing.assert_allclose(rows["sem"], values.std(1, ddof=1) / np.sqrt(3))
    assert rows["n"].tolist() == [3] * 4
    said = json.loads(rows["provenance"][0])
    assert said["weight_digest"] == plan.models[0].digest
    assert said["probe"]["method"] == "zero"
    assert said["checks"]["own_output_changed"] is True
    assert said["versions"]["torch"]


def test_workers_share_the_work_and_end_together() -> None:
    """Each keeps to its model and group of cells, and the last chunks are the short ones."""
    planned = make_plan(config(edits=["zero", "mean"], chunk=2))
    waiting = Waiting.of(planned, planned.chunks)
    held: dict[int, int] = {}
    taken: dict[int, list[Chunk]] = {0: [], 1: []}
    busy = {0: 0.0, 1: 0.0}
    while waiting:
        worker = min(busy, key=lambda one: busy[one])
        chunk = waiting.take(held.get(worker), Counter(held.values()))
        held[worker] = chunk.study
        taken[worker].append(chunk)
        busy[worker] += passes_of_chunk(planned, chunk)
    assert sorted(chunk.id for chunks in taken.values() for chunk in chunks) == sorted(ids(planned))
    for chunks in taken.values():
        assert len({chunk.study for chunk in chunks}) == 1
        costs = [passes_of_chunk(planned, chunk) for chunk in chunks]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] < costs[0]
    last = min(passes_of_chunk(planned, chunk) for chunk in planned.chunks)
    assert abs(busy[0] - busy[1]) <= last


def test_a_worker_keeps_its_model_while_there_is_work() -> None:
    first, *_, last = bundled.checkpoints("tiny-gpt2")
    wanted = config(models=[{"model": "tiny-gpt2", "checkpoints": [first, last]}], edits=["zero"])
    planned = make_plan(wanted)
    waiting = Waiting.of(planned, planned.chunks)
    one = waiting.take(None, {})
    two = waiting.take(None, {one.study: 1})
    assert planned.model_of(one) != planned.model_of(two)
    rest = [waiting.take(one.study, {one.study: 1, two.study: 1}) for _ in range(2)]
    assert {planned.model_of(chunk) for chunk in rest} == {planned.model_of(one)}
    helped = waiting.take(one.study, {one.study: 1, two.study: 1})
    assert planned.model_of(helped) == planned.model_of(two)
