"""What is stored where: the two ways of recalling, told apart; state-space models; trees."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.compiled.library import induction_program, pointer_program
from headscope.errors import InputError, UnsupportedModelError


def by_position(grid: hs.EffectGrid, component: str) -> dict[str, float]:
    """Largest mean effect over layers."""
    at = grid.labels[0].index(component)
    best = np.nanmax(grid.mean[at], 0)
    return {name: float(best[number]) for number, name in enumerate(grid.labels[2])}


def recall(corrupt: str = "key") -> hs.Probe:
    return hs.probes.recall(range(1, 6), range(6, 11), pairs=3, batch=8, corrupt=corrupt)


@pytest.mark.parametrize("rotation_seed", [None, 1])
def test_induction_stores_pairs_at_the_value_and_a_pointer_looks_up_at_the_query(
    rotation_seed: int | None,
) -> None:
    induction = hs.compiled.compiled(induction_program(11, 8), rotation_seed=rotation_seed)
    found = hs.ablation.restore(induction.model, recall())
    np.testing.assert_allclose(found.pair[0], 1, atol=0.01)
    np.testing.assert_allclose(found.pair[1], 0, atol=0.02)
    first = found.labels[0].index("mixer_out"), found.labels[1].index("L0")
    stored = dict(zip(found.labels[2], found.mean[first], strict=True))
    assert stored["value"] > 0.97
    assert max(abs(stored[name]) for name in ("key", "query", "others")) < 0.01

    pointer = hs.compiled.compiled(pointer_program(11, 8), rotation_seed=rotation_seed)
    looked = by_position(hs.ablation.restore(pointer.model, recall()), "mixer_out")
    assert looked["query"] > 0.97
    assert max(abs(looked[name]) for name in ("key", "value", "others")) < 0.01


def test_it_is_what_patching_the_stream_finds() -> None:
    model, probe = hs.load("tiny-llama"), hs.probes.recall(range(5, 30), range(30, 60), batch=4)
    found = hs.ablation.restore(model, probe, hs.metrics.answer_log_prob, batch_size=3)
    sites = {"resid_pre": "resid_pre", "mixer_out": "attn_out", "mlp_out": "mlp_out",
             "resid_post": "resid_post"}  # fmt: skip
    for at, component in enumerate(found.labels[0]):
        grid = hs.patch_stream(
            model, probe, hs.metrics.answer_log_prob, sites[component], direction="denoise",
            positions=list(found.labels[2]),
        )  # fmt: skip
        np.testing.assert_allclose(found.mean[at], grid.mean, atol=1e-4)


def mamba() -> torch.nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5
    )
    return MambaForCausalLM(config).eval()


def test_a_state_space_model_is_restored_and_has_no_rows() -> None:
    module, probe = mamba(), recall()
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        hs.load(module)
    grid = hs.ablation.restore(module, probe)
    with torch.no_grad():
        logits = [module(tokens).logits for tokens in (probe.tokens, probe.corrupt.tokens)]
    for mine, own in zip(grid.pair, logits, strict=True):
        expected = own[:, -1].softmax(-1).gather(1, probe.targets[:, -1:])[:, 0]
        np.testing.assert_allclose(mine, expected, atol=1e-5)
    # What enters the first block differs at the key alone: restoring it restores everything.
    whole = grid.per_example[grid.labels[0].index("resid_pre"), 0, grid.labels[2].index("key")]
    np.testing.assert_allclose(whole, grid.pair[0] - grid.pair[1], atol=1e-5)
    # What leaves the last block matters where it is read.
    last = grid.per_example[grid.labels[0].index("resid_post"), -1]
    np.testing.assert_allclose(last[grid.labels[2].index("query")], whole, atol=1e-5)
    np.testing.assert_allclose(last[grid.labels[2].index("value")], 0, atol=1e-6)
    assert np.isnan(grid.mean[grid.labels[0].index("mlp_out")]).all()
    assert not module.training
    assert not any(part._forward_hooks for part in module.modules())


def test_hybrids_are_rows_of_mixers() -> None:
    from transformers import BambaConfig, BambaForCausalLM

    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, pad_token_id=0,
    )  # fmt: skip
    grid = hs.ablation.restore(BambaForCausalLM(config).eval(), recall())
    assert np.isfinite(grid.mean).all()
    whole = grid.per_example[0, 0, grid.labels[2].index("key")]
    np.testing.assert_allclose(whole, grid.pair[0] - grid.pair[1], atol=1e-5)


def test_recall_is_what_it_says() -> None:
    for ask in ("key", "value"):
        probe = hs.probes.recall(range(1, 6), range(6, 11), pairs=3, batch=20, ask=ask, end=(12,))
        for row, other in zip(probe.tokens.tolist(), probe.corrupt.tokens.tolist(), strict=True):
            assert row[0] == 0
            assert row[-2] == 12
            partner = dict(zip(row[1:7:2], row[2:7:2], strict=True))
            assert len(partner) == 3
            if ask == "value":
                partner = {v: k for k, v in partner.items()}
            at = probe.tokens.tolist().index(row)
            assert int(probe.targets[at, -1]) == partner[row[-1]]
            changed = [n for n, (a, b) in enumerate(zip(row, other, strict=True)) if a != b]
            assert changed == probe.mark("key")[at].nonzero().flatten().tolist()
            assert other[changed[0]] not in row
            assert other[changed[0]] in range(1, 6)
    assert probe.tokens.equal(hs.probes.recall(
        range(1, 6), range(6, 11), pairs=3, batch=20, ask="value", end=(12,)).tokens)  # fmt: skip


@pytest.mark.parametrize("ask", ["parent", "child"])
def test_trees_are_what_they_say(ask: str) -> None:
    probe = hs.probes.tree_recall(range(3, 15), 1, 2, nodes=6, batch=30, ask=ask)
    for at, row in enumerate(probe.tokens.tolist()):
        above: list[int] = []
        parents = {}
        for n, token in enumerate(row[1:-1]):
            if token == 2:
                above.pop()
            elif token != 1:
                assert row[n] == 1
                parents[token] = above[-1] if above else None
                above.append(token)
        assert not above
        assert len(parents) == 6
        answer = int(probe.targets[at, -1])
        if ask == "parent":
            assert parents[row[-1]] == answer
        else:
            assert [child for child, parent in parents.items() if parent == row[-1]] == [answer]
        mark = probe.mark("parent" if ask == "parent" else "child")[at]
        assert [row[n] for n in mark.nonzero().flatten().tolist()] == [answer]
        other = probe.corrupt.tokens[at]
        assert (other != probe.tokens[at]).equal(mark)


def test_mistakes_are_said() -> None:
    with pytest.raises(InputError, match="give 4 keys and 4 values"):
        hs.probes.recall(range(1, 4), range(6, 11), pairs=3)
    with pytest.raises(InputError, match="none of them both"):
        hs.probes.recall(range(1, 8), range(6, 11), pairs=3)
    with pytest.raises(InputError, match="did you mean 'value'"):
        hs.probes.recall(range(1, 6), range(6, 11), corrupt="valu")
    with pytest.raises(InputError, match="a tree of 6 nodes: give 7 labels"):
        hs.probes.tree_recall(range(3, 9), 1, 2)
    with pytest.raises(InputError, match="no corrupt probe"):
        hs.ablation.restore(mamba(), hs.probes.from_tokens(torch.tensor([[1, 2, 3]])))
    with pytest.raises(UnsupportedModelError, match="restore takes a model"):
        hs.ablation.restore("gpt2", recall())
    with pytest.raises(UnsupportedModelError, match="no single row"):
        hs.ablation.restore(torch.nn.Linear(2, 2), recall())


def test_training_curves_are_written_as_they_are_measured() -> None:
    from tools import mixers

    task, learner = mixers.TASKS["tree recall"], mixers.LEARNERS["transformer"]
    points = mixers.curve(task, learner, steps=8)
    assert [one.step for one in points] == list(range(9))
    again = mixers.curve(task, learner, steps=8)
    assert points == again  # seeded
    text = mixers.page({("tree recall", "transformer"): points})
    assert f"| 8 | {points[-1].accuracy:.2f} |" in text
    committed = mixers.PAGE.read_text("utf-8")
    assert committed.startswith(text[: text.index("## ")])
    for task_name in mixers.TASKS:
        for model in mixers.LEARNERS:
            assert f"## {task_name.capitalize()}: {model}" in committed
    # Both learned, by the two mechanisms that compiled models show.
    rows = [line.split("|")[1:-1] for line in committed.splitlines() if "recall | " in line]
    assert all(float(row[2]) > 0.9 for row in rows)
    assert {row[1].strip(): row[5].strip() for row in rows if "associative" in row[0]} == {
        "transformer": "stored in place",
        "state space": "looked up at the query",
    }
