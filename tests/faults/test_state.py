"""What a pass leaves behind, and what another pass sees: nothing, and nothing of each other."""

import gc
import importlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.base import options as memory
from headscope.models.bridge.model import bridge_over, wrap_bridge
from headscope.models.protocol import HeadModel
from headscope.models.running import weight_digest
from headscope.scoring.score import Accumulator
from tests.models.families import BRIDGE_FAMILIES, HF_FAMILIES, build, fresh
from tests.watching import watch

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
X = torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(1))
PROBE = hs.probes.from_tokens(X)
LOSS = hs.metrics.loss


def llama(**changed: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changed})).eval()


def gpt2(**changed: Any) -> Any:
    torch.manual_seed(0)
    config = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(**{**config, **ids, "initializer_range": 0.4, **changed})
    ).eval()


def scored(model: Any, name: str = "previous_token", **options: Any) -> np.ndarray:
    return hs.score(model, PROBE, [name], progress=False, **options)[name].mean


def ablated(model: Any, **options: Any) -> np.ndarray:
    return hs.ablate_heads(model, PROBE, LOSS, "zero", progress=False, **options).mean


def hooks_of(module: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


# --- B1: evaluation mode -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, lambda: llama(attention_dropout=0.5)])
def test_b1_passes_run_in_evaluation_mode_and_the_mode_comes_back(make: Callable[[], Any]) -> None:
    module = make()
    model = hs.load(module)
    readings: list[Callable[[], Any]] = [
        lambda: scored(model),
        lambda: ablated(model, heads=["L1H1"]),
        lambda: hs.estimate_heads(model, PROBE, LOSS, progress=False).mean,
        lambda: hs.lens.logit_lens(model, X[0], target=5).target_probability,
        lambda: hs.ablation.head_means(model, PROBE)[1].numpy(),
        lambda: hs.retrieval.generate(model, X, new_tokens=3, progress=False).tokens,
    ]
    calm = [np.asarray(reading()) for reading in readings]
    module.train()
    module.get_input_embeddings().eval()  # a part that its owner froze stays as it is
    for reading, wanted in zip(readings, calm, strict=True):
        np.testing.assert_array_equal(np.asarray(reading()), wanted)
        assert module.training
        assert not module.get_input_embeddings().training
        assert all(m.training for m in module.modules() if m is not module.get_input_embeddings())


@pytest.mark.parametrize("make", [gpt2, lambda: llama(attention_dropout=0.5), lambda: neo()])
def test_b1_a_model_in_training_mode_is_loaded_as_it_runs_without_dropout(
    make: Callable[[], Any],
) -> None:
    calm = hs.load(make())
    module = make().train()
    frozen = next(part for part in module.modules() if isinstance(part, nn.Dropout | nn.Linear))
    frozen.eval()
    modes = [part.training for part in module.modules()]
    model = hs.load(module)
    assert [part.training for part in module.modules()] == modes
    assert model.limits == calm.limits
    np.testing.assert_array_equal(scored(model), scored(calm))
    np.testing.assert_array_equal(ablated(model), ablated(calm))
    torch.testing.assert_close(model.weights(1).W_V, calm.weights(1).W_V)
    assert [part.training for part in module.modules()] == modes


def neo() -> Any:
    """A model of a family that transformer-lens runs, with dropout."""
    module = fresh("gpt_neo")
    module.config.attention_dropout = 0.5
    return module


@pytest.mark.parametrize("broken", [False, True])
def test_b1_a_refused_model_keeps_its_mode(broken: bool) -> None:
    module = llama(attention_dropout=0.5).train()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before = (hooks_of(module), module.config._attn_implementation)
    with pytest.raises(hs.HeadscopeError):
        hs.load(module if broken else module.model)
    assert all(part.training for part in module.modules())
    assert (hooks_of(module), module.config._attn_implementation) == before


def test_b1_checkpoints_of_gradients_and_frozen_weights_change_nothing() -> None:
    plain = hs.load(llama())
    module = llama(attention_dropout=0.5).train()
    module.activation_checkpointing_enable()
    module.enable_input_require_grads()
    for name, weight in module.named_parameters():
        weight.requires_grad_("layers.1" in name)
    wanted = [weight.requires_grad for weight in module.parameters()]
    nothing = hs.load(llama().requires_grad_(False))
    for reading in (
        lambda m: scored(m),
        lambda m: ablated(m, heads=["L1H1"]),
        lambda m: hs.estimate_heads(m, PROBE, LOSS, progress=False).mean,
        lambda m: hs.pruning.gradient_importance(m, PROBE, progress=False).mean,
        lambda m: hs.lens.attribute(m, X[0], target=5).to_pandas()["value"].to_numpy(),
        lambda m: hs.circuits.qk(m, offset=1).singular_values(),
    ):
        found, expected = (np.asarray(reading(m)) for m in (hs.load(module), plain))
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(np.asarray(reading(nothing)), expected, atol=1e-6, rtol=1e-4)
    assert [weight.requires_grad for weight in module.parameters()] == wanted
    assert all(weight.grad is None for weight in module.parameters())
    assert module.is_activation_checkpointing
    assert all(part.training for part in module.modules())


def test_b1_a_scope_leaves_the_mode_to_the_owner() -> None:
    module = llama()
    model = hs.load(module)
    module.train()
    with model.edited([hs.edits.zero("L0H0")]):
        assert module.training
        model.forward(X)
        assert module.training


def within(model: Any, call: Callable[[], Any]) -> None:
    with model.edited([hs.edits.uniform("L0H0"), hs.edits.zero("L1H0")]):
        call()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["observer", "edit", "scope"])
@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_b1_whatever_ends_a_pass_everything_comes_back(
    family: str, place: str, error: type[BaseException]
) -> None:
    module = fresh(family)
    model = hs.load(module)
    inside = model.module  # of a bridge its own tree
    before = (hooks_of(inside), inside.config._attn_implementation, sorted(vars(inside)))
    kernels = [sorted(vars(m)) for m in inside.modules()]
    plain = model.forward(X)
    inside.train()

    class Stop:
        site, layers, wants_final = "z", frozenset({1}), False

        def __call__(self, layer: int, value: Tensor) -> Tensor:
            raise error

        def on_layer(self, view: Any) -> None:
            raise error

        def on_final(self, residual: Tensor) -> None: ...

    calls = {
        "observer": lambda: watch(model, X, Stop()),
        "edit": lambda: model.forward(X, edits=[Stop(), hs.edits.uniform("L0H0")]),
        "scope": lambda: within(model, lambda: model.forward(X, edits=[Stop()])),
    }
    with pytest.raises(error):
        calls[place]()
    assert inside.training
    inside.eval()
    assert (hooks_of(inside), inside.config._attn_implementation, sorted(vars(inside))) == before
    assert [sorted(vars(m)) for m in inside.modules()] == kernels
    assert torch.equal(model.forward(X), plain)


# --- B2: models under training -------------------------------------------------------------------


def stepped(module: Any, how: str) -> None:
    """Change every weight that a reading looks at, as a trainer might."""
    generator = torch.Generator().manual_seed(9)
    norm = next(m for n, m in module.named_modules() if n.endswith(("ln_f", "model.norm")))
    after = [m for n, m in module.named_modules() if "post_attention" in n]
    for part in [norm, *after, module.get_output_embeddings()]:
        noise = torch.randn(part.weight.shape, generator=generator)
        if how == "in place":
            with torch.no_grad():
                part.weight.add_(noise)
        elif how == "past the count of changes":
            part.weight.data.add_(noise)
        else:
            part.weight = nn.Parameter(part.weight.detach() + noise)


@pytest.mark.parametrize("how", ["in place", "past the count of changes", "new parameters"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_b2_readings_of_a_kept_wrapper_are_those_of_a_new_one(family: str, how: str) -> None:
    module = fresh(family)
    kept = hs.load(module)

    def readings(model: Any) -> list[np.ndarray]:
        pair = {"target": 5, "foil": 9}
        attributed = hs.lens.attribute(model, X[0], **pair)
        found = [hs.lens.logit_lens(model, X[0], target=5).target_probability]
        found.append(attributed.to_pandas()["value"].to_numpy())
        if "linear_write" not in model.limits:
            found += [scored(model, "copying"), scored(model, "direct_logit_attribution")]
        return found

    first = readings(kept)
    digest = kept.digest()
    stepped(module, how)
    assert kept.digest() != digest
    for old, now, new in zip(first, readings(kept), readings(hs.load(module)), strict=True):
        np.testing.assert_allclose(now, new, atol=1e-6)
        assert not np.allclose(old, new, atol=1e-3)


# --- B3: static caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "prefill", "decode"])
@pytest.mark.parametrize("method", ["zero", "uniform"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_b3_static_caches_write_what_others_write(family: str, method: Any, scope: Any) -> None:
    module = fresh(family)
    model = hs.load(module)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0  # padded on the left

    def said(cache: str | None) -> Tensor:
        found: Tensor = module.generate(
            X[:2, :7], attention_mask=mask, cache_implementation=cache, **options
        )
        return found

    plain = said(None)
    with hs.mask_heads(model, ["L0H1", "L1H2", "L2H0"], method, scope):
        dynamic, static = said(None), said("static")
    assert torch.equal(dynamic, static)
    assert torch.equal(said("static"), plain)
    if scope == "all" and family == "llama":
        assert not torch.equal(dynamic, plain)


# --- B4: two wrappers, shared configs ------------------------------------------------------------


@pytest.mark.parametrize("edit", [hs.edits.uniform("L0H0"), hs.edits.zero("L0H0")])
def test_b4_an_edit_by_one_wrapper_is_an_edit_of_the_module(edit: hs.edits.HeadEdit) -> None:
    module = llama()
    one, two = hs.load(module), hs.load(module)
    wanted = one.forward(X, edits=[edit])
    with one.edited([edit]), torch.no_grad():
        torch.testing.assert_close(module(X).logits, wanted)
        torch.testing.assert_close(two.forward(X), wanted)
        inner = hs.edits.uniform("L2H1")
        with two.edited([inner]):
            both = module(X).logits
    torch.testing.assert_close(both, one.forward(X, edits=[edit, inner]))


def test_b4_scaling_within_a_scope_happens_once_under_an_ablation() -> None:
    model = hs.load(llama())
    half = hs.edits.scale(["L0H0", "L1H0"], 0.5)
    clean = LOSS(model.forward(X, edits=[half]), PROBE)
    off = LOSS(model.forward(X, edits=[half, hs.edits.zero("L1H1")]), PROBE)
    with model.edited([half]):
        found = ablated(model, heads=["L1H1"])
    assert found[1, 1] == pytest.approx(float((off - clean).mean()), abs=1e-5)


def test_b4_models_that_share_a_config_do_not_see_each_other() -> None:
    config = LlamaConfig(**SMALL)
    base, tuned = (LlamaForCausalLM(config).eval() for _ in range(2))
    one, two = hs.load(base), hs.load(tuned)
    with torch.no_grad():
        wanted = base(X).logits
        with two.edited([hs.edits.uniform("L0H0")]):
            torch.testing.assert_close(base(X).logits, wanted)
            torch.testing.assert_close(one.forward(X), wanted)
            with one.edited([hs.edits.zero("L0H1")]):
                two.forward(X)
        torch.testing.assert_close(base(X).logits, wanted)
    assert config._attn_implementation == "sdpa"


def test_b4_two_heads_on_one_body_share_its_scopes() -> None:
    first, second = llama(), llama()
    second.model = first.model
    model, other = hs.load(first), hs.load(second)
    edit = hs.edits.uniform("L0H0")
    with model.edited([edit]):
        inside = other.forward(X)
    torch.testing.assert_close(inside, other.forward(X, edits=[edit]))


# --- B5: threads ---------------------------------------------------------------------------------


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def run(at: int) -> None:
        try:
            found[at] = calls[at]()
        except Exception as error:
            found[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_b5_threads_get_the_numbers_that_they_get_alone() -> None:
    module = gpt2()
    one, two = hs.load(module), hs.load(module)
    before, hooks = module.config._attn_implementation, hooks_of(module)
    calls = [
        lambda: scored(one),
        lambda: ablated(two),
        lambda: hs.estimate_heads(one, PROBE, LOSS, progress=False).mean,
        lambda: hs.lens.logit_lens(two, X[0], target=5).target_probability,
    ]
    wanted = [call() for call in calls]
    module.train()
    for _ in range(3):
        for found, alone in zip(in_threads(*calls), wanted, strict=True):
            assert not isinstance(found, Exception), found
            np.testing.assert_allclose(found, alone, atol=1e-6)
    assert module.config._attn_implementation == before
    assert hooks_of(module) == hooks
    assert all(part.training for part in module.modules())


def test_b5_a_scope_of_another_thread_is_refused_and_its_passes_are_its_own() -> None:
    model = hs.load(llama())
    edit = hs.edits.uniform("L0H0")
    plain = model.forward(X)
    with model.edited([edit]):
        refused, own = in_threads(lambda: model.forward(X), lambda: model.module(X).logits)
        assert isinstance(refused, hs.HeadscopeError)
        assert "another thread" in str(refused)
        torch.testing.assert_close(own.detach(), model.forward(X))
    torch.testing.assert_close(model.forward(X), plain)


def test_b5_a_call_beside_a_running_pass_is_the_models_own() -> None:
    model = hs.load(llama())
    with torch.no_grad():
        plain = model.module(X).logits
    found: list[Tensor] = []

    class Beside:
        wants_final = False

        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_layer(self, view: Any) -> None:
            self.seen.append(view.layer)
            if view.layer == 1:
                found.extend(in_threads(lambda: model.module(X).logits.detach()))

        def on_final(self, residual: Tensor) -> None: ...

    beside = Beside()
    edited = watch(model, X, beside, edits=[hs.edits.zero("L0H0")])
    assert beside.seen == [0, 1, 2]
    torch.testing.assert_close(found[0], plain)
    torch.testing.assert_close(edited, model.forward(X, edits=[hs.edits.zero("L0H0")]))


def test_b5_a_pass_inside_a_pass_is_not_edited_by_it() -> None:
    model = hs.load(llama())
    plain, found = model.forward(X), []

    class Inside:
        wants_final = False

        def on_layer(self, view: Any) -> None:
            if view.layer == 1:
                found.append(model.forward(X))

        def on_final(self, residual: Tensor) -> None: ...

    edits = [hs.edits.zero("L0H0"), hs.edits.uniform("L2H0")]
    outer = watch(model, X, Inside(), edits=edits)
    torch.testing.assert_close(found[0], plain)
    torch.testing.assert_close(outer, model.forward(X, edits=edits))


# --- B6: nested scopes ---------------------------------------------------------------------------

EDITS = {
    "z": lambda head: hs.edits.zero(head),
    "query": lambda head: hs.edits.uniform(head),
    "key": lambda head: hs.edits.scale((head[1], 0), 3.0, site="key"),
    "value": lambda head: hs.edits.scale((head[1], 0), 3.0, site="value"),
    "pattern": lambda head: hs.edits.attend_to_first(head, PROBE.real),
}


@pytest.mark.parametrize("family", [*HF_FAMILIES, *BRIDGE_FAMILIES])
def test_b6_scopes_nest_in_every_family(family: str) -> None:
    model = hs.load(build(family), check=False)
    plain = model.forward(X)
    for site, make in EDITS.items():
        outer, inner = make((0, 1)), make((1, 2))
        try:
            wanted = model.forward(X, edits=[outer, inner])
        except hs.HeadscopeError:
            assert model.path == "bridge"  # transformer-lens does not show the site
            continue
        alone = model.forward(X, edits=[outer])
        with model.edited([outer]):
            with model.edited([inner]):
                torch.testing.assert_close(model.forward(X), wanted, msg=site)
            torch.testing.assert_close(model.forward(X), alone, msg=site)
        torch.testing.assert_close(model.forward(X), plain)


def test_b6_measurements_inside_a_scope_are_of_the_unedited_model() -> None:
    model = hs.load(fresh("gemma2"))
    everything = [hs.edits.zero(model.shape.heads), hs.edits.uniform(model.shape.heads)]
    before = model.parts.attention_write(1).norm
    with hs.load(model.module).edited(everything):
        again = hs.load(model.module)
        assert again.shape == model.shape
        inside = again.parts.attention_write(1).norm
        embedding = again.parts.embedding
    assert before is not None
    assert inside is not None
    torch.testing.assert_close(inside.gain, before.gain)
    torch.testing.assert_close(embedding, model.parts.embedding)


# --- B7: phase and positions ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "bloom"])
@pytest.mark.parametrize("length", [1, 5])
def test_b7_a_prompt_is_a_prompt_however_short(family: str, length: int) -> None:
    model = hs.load(build(family), check=False)
    ids = X[:, :length]
    everywhere = model.forward(ids, edits=[hs.edits.zero(["L0H0", "L1H1"])])
    plain = model.forward(ids)
    for scope, wanted in (("prefill", everywhere), ("decode", plain)):
        edit = hs.edits.zero(["L0H0", "L1H1"], scope=scope)
        torch.testing.assert_close(model.forward(ids, edits=[edit]), wanted)
        with model.edited([edit]), torch.no_grad():
            torch.testing.assert_close(model.module(ids).logits, wanted)
    split = model.forward(ids, edits=[hs.edits.zero("L0H0", scope="decode")], prompt=length - 1)
    where = torch.zeros(4, length, dtype=torch.bool)
    where[:, -1] = True
    last = model.forward(ids, edits=[hs.edits.zero("L0H0", positions=where)])
    torch.testing.assert_close(split, last)


@pytest.mark.parametrize("site", ["z", "query", "pattern"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss"])
def test_b7_scopes_mean_under_replay_what_they_mean_in_a_pass(family: str, site: str) -> None:
    model = hs.load(build(family), check=False)
    late = torch.zeros(4, 12, dtype=torch.bool)
    late[:, -1] = True
    probe = hs.probes.from_tokens(X)
    head = (1, 1)

    def edit(scope: Any, positions: Any) -> Callable[[Any], hs.edits.HeadEdit]:
        def make(heads: Any) -> hs.edits.HeadEdit:
            made = EDITS[site](head)
            return hs.edits.HeadEdit(
                made.name, made.heads, made.site, made.donors, made.factor, positions, scope
            )

        return make

    clean = LOSS(model.forward(X), probe)
    for positions in (None, late):
        for scope in ("all", "prefill", "decode"):
            make = edit(scope, positions)
            wanted = LOSS(model.forward(X, edits=[make(head)]), probe) - clean
            found = hs.ablate_heads(model, probe, LOSS, make, heads=[head], progress=False)
            assert found.provenance.checks["engine"] == "suffix replay"
            np.testing.assert_allclose(
                found.per_example[1, 1], wanted.numpy(), atol=2e-5, err_msg=f"{scope} {positions}"
            )
            if scope == "decode":
                assert not found.mean[1, 1]


def test_b7_the_phase_of_generation_is_a_fact_and_not_a_size() -> None:
    """Prompts read in parts, and steps of several tokens at a time, as speculation takes them."""
    module = llama()
    model = hs.load(module)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def said(scope: Any, **more: Any) -> Tensor:
        with hs.mask_heads(model, ["L0H1", "L1H2"], "zero", scope):
            found: Tensor = module.generate(X[:1], **options, **more)
        return found

    for scope in ("prefill", "decode"):
        plain = said(scope)
        assert torch.equal(said(scope, prefill_chunk_size=5), plain)
        assert torch.equal(said(scope, prompt_lookup_num_tokens=3), plain)
    assert not torch.equal(said("prefill"), said("decode"))


def test_b7_a_loop_of_the_callers_decodes_where_it_extends_a_cache() -> None:
    module = llama()
    model = hs.load(module)
    edit = hs.edits.zero(["L0H1", "L1H2"], scope="decode")
    where = torch.zeros(4, 12, dtype=torch.bool)
    where[:, 8:] = True
    wanted = model.forward(X, edits=[hs.edits.zero(["L0H1", "L1H2"], positions=where)])
    with model.edited([edit]), torch.no_grad():
        first = module(X[:, :8], use_cache=True)
        rest = module(X[:, 8:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), wanted)


def test_b7_positions_of_an_edit_are_those_of_the_text_in_every_step() -> None:
    module = llama()
    model = hs.load(module)
    where = torch.zeros(4, 12, dtype=torch.bool)
    where[:, [2, 9]] = True
    donors = hs.ablation.head_values(model, X.flip(0))
    for edit in (
        hs.edits.zero("L0H1", positions=where),
        hs.edits.resample("L1H1", donors),
        hs.edits.freeze_pattern(
            "L1H2", hs.ablation.head_values(model, X.flip(0), site="pattern"), positions=where
        ),
        hs.edits.attend_to_first("L0H2", PROBE.real),
    ):
        wanted = model.forward(X, edits=[edit])
        with model.edited([edit]), torch.no_grad():
            first = module(X[:, :8], use_cache=True)
            steps = [first.logits]
            for at in range(8, 12):
                cache = first.past_key_values
                steps.append(module(X[:, at : at + 1], past_key_values=cache).logits)
        # Steps with a cache alone are rounded by up to 4e-5 otherwise; a wrong position is 0.1.
        assert float((torch.cat(steps, 1) - wanted).abs().max()) < 1e-4, edit.name


def test_b7_positions_that_do_not_fit_are_named() -> None:
    model = hs.load(llama())
    short = hs.edits.zero("L0H0", positions=torch.ones(4, 5, dtype=torch.bool))
    few = hs.edits.zero("L0H0", positions=torch.ones(3, 12, dtype=torch.bool))
    for edit, said in ((short, "positions for 5 tokens"), (few, "3, 12")):
        with pytest.raises(hs.HeadscopeError, match=said):
            model.forward(X, edits=[edit])


# --- B8: offloaded layers ------------------------------------------------------------------------


def offloaded(kind: str) -> Any:
    module = llama()
    if kind == "cpu":
        cpu_offload(module, execution_device=torch.device("cpu"))
        return module
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    places = dict.fromkeys([*names, "model.layers.0", "model.layers.2"], "cpu")
    places["model.layers.1"] = "disk"
    return dispatch_model(
        module, places, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_b8_offloaded_layers_give_what_loaded_ones_give(kind: str) -> None:
    whole, away = hs.load(llama()), hs.load(offloaded(kind))
    assert away.device.type == "cpu"
    before = [p.is_meta for p in away.module.parameters()]
    assert any(before)

    def readings(model: Any) -> list[Any]:
        return [
            model.forward(X).numpy(),
            scored(model),
            scored(model, "copying"),
            ablated(model),
            hs.estimate_heads(model, PROBE, LOSS, progress=False).mean,
            hs.lens.attribute(model, X[0], target=5).to_pandas()["value"].to_numpy(),
            hs.circuits.ov(model).singular_values().numpy(),
            model.output_weights(1).numpy(),
        ]

    for found, wanted in zip(readings(away), readings(whole), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert away.digest() == whole.digest()
    assert [p.is_meta for p in away.module.parameters()] == before  # nothing stays loaded


@pytest.mark.filterwarnings("ignore")
def test_b8_a_pass_that_is_cut_short_leaves_nothing_loaded() -> None:
    model = hs.load(offloaded("cpu"))

    class Stop:
        wants_final = False

        def on_layer(self, view: Any) -> None:
            raise KeyboardInterrupt

        def on_final(self, residual: Tensor) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        watch(model, X, Stop())
    assert all(p.is_meta for p in model.module.parameters())


# --- B9: compiled models -------------------------------------------------------------------------


def compiled(how: str) -> Any:
    module = llama()
    if how == "model.compile()":
        module.compile(backend="eager")
    elif how == "torch.compile(model)":
        return torch.compile(module, backend="eager")
    elif how == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    elif how == "blocks":
        for block in module.model.layers:
            block.compile(backend="eager")
    else:
        for at, block in enumerate(module.model.layers):
            module.model.layers[at] = torch.compile(block, backend="eager")
    return module


@pytest.mark.parametrize(
    "how", ["model.compile()", "torch.compile(model)", "forward", "blocks", "wrapped blocks"]
)
def test_b9_compiled_models_give_what_others_give(how: str) -> None:
    module, plain = compiled(how), hs.load(llama())
    with torch.no_grad():
        module(X)  # compiled before anybody looks
    model = hs.load(module)
    np.testing.assert_allclose(scored(model), scored(plain), atol=1e-6)
    np.testing.assert_allclose(ablated(model), ablated(plain), atol=1e-5)
    edits = [hs.edits.zero("L0H1"), hs.edits.uniform("L1H0")]
    wanted = plain.forward(X, edits=edits)
    torch.testing.assert_close(model.forward(X, edits=edits), wanted)
    with model.edited(edits), torch.no_grad():
        torch.testing.assert_close(module(X).logits, wanted)
    with torch.no_grad():
        torch.testing.assert_close(module(X).logits, plain.forward(X))


# --- B10: types ----------------------------------------------------------------------------------


@contextmanager
def float64_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], Any]] = {
    "float64 by default": float64_default,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients on": torch.enable_grad,
}
READINGS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda m: m.forward(X).detach(),
    "score": lambda m: scored(m),
    "score copying": lambda m: scored(m, "copying"),
    "score attribution": lambda m: scored(m, "direct_logit_attribution"),
    "ablate": lambda m: ablated(m),
    "resample": lambda m: hs.ablate_heads(m, PROBE, LOSS, "resample", progress=False).mean,
    "estimate": lambda m: hs.estimate_heads(m, PROBE, LOSS, progress=False).mean,
    "importance": lambda m: hs.pruning.gradient_importance(m, PROBE, progress=False).mean,
    "attribute": lambda m: hs.lens.attribute(m, X[0], target=5).to_pandas()["value"].to_numpy(),
    "logit lens": lambda m: hs.lens.logit_lens(m, X[0], target=5).target_probability,
    "ov": lambda m: hs.circuits.ov(m).svd().S,
    "qk": lambda m: hs.circuits.qk(m).singular_values(),
    "composition": lambda m: hs.circuits.composition(m, "K").values,
    "circuits": lambda m: [one.mean for one in hs.circuits.score(m, tokens=16).values()],
    "trace": lambda m: [e.contribution for e in hs.circuits.trace(m, X[0], "L2H0", 7, 3)],
    "mappings": lambda m: hs.circuits.salient_mappings(m, "L1H1", sources=3, targets=2).saliency,
    "components": lambda m: hs.circuits.component_composition(m, "K").values,
    "affinity": lambda m: hs.circuits.subspace_affinity(m, "K").values,
    "eigenvalues": lambda m: np.sort(np.abs(hs.circuits.eigenvalues(m, "OV").values)),
    "survey": lambda m: [one.values for one in hs.circuits.survey(m, tokens=8, paths=1).pairs],
    "weight norm": lambda m: hs.pruning.weight_norm(m).mean,
    "tuned lens": lambda m: fitted(hs.lens.tuned_lens(m, PROBE, steps=3, progress=False)),
    "attention lens": lambda m: fitted(hs.lens.attention_lens(m, PROBE, steps=3, progress=False)),
    "generate": lambda m: torch.tensor(
        hs.retrieval.generate(m, X, new_tokens=3, progress=False).tokens
    ),
    "prune": lambda m: torch.cat(
        [p.detach().flatten() for p in hs.prune(m, ["L0H1"]).parameters()]
    ),
}


def test_b10_a_model_made_in_inference_mode_is_read_but_for_gradients() -> None:
    with torch.inference_mode():
        module, named = llama(), hs.load("tiny-gpt2")
    model = hs.load(module)
    np.testing.assert_array_equal(scored(model), scored(hs.load(llama())))
    asks: list[Callable[[], Any]] = [
        lambda: hs.estimate_heads(model, PROBE, LOSS, progress=False),
        lambda: hs.circuits.ov(model),
        lambda: hs.prune(model, ["L0H1"]),
    ]
    for ask in asks:
        with pytest.raises(hs.HeadscopeError, match=r"created in torch\.inference_mode"):
            ask()
    assert hs.circuits.ov(named).norm().shape == (named.shape.n_layers, named.shape.n_heads)


def fitted(lens: Any) -> Tensor:
    """The first of a fitted lens's weights."""
    return next(value for value in vars(lens).values() if isinstance(value, Tensor)).detach()


@pytest.mark.parametrize("around", [*AROUND, "no gradients"])
def test_b10_norms_of_queries_are_measured_in_the_models_own_types(around: str) -> None:
    wanted = hs.circuits.qk(hs.load(fresh("qwen3")), offset=1).singular_values()
    module = fresh("qwen3")
    with AROUND.get(around, torch.no_grad)():
        model = hs.load(module)
        found = hs.circuits.qk(model, offset=1).singular_values()
        pruned = hs.prune(model, ["L0H1"])  # its heads are told apart by gradients
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert pruned.config.model_type == "qwen3"


@pytest.fixture(scope="module")
def loaded_within() -> dict[str, HeadModel]:
    """One model for each thing around, loaded there; no reading writes to it."""
    found = {}
    for around, enter in AROUND.items():
        module = llama()
        with enter():
            found[around] = hs.load(module)
    return found


@pytest.mark.parametrize("name", READINGS)
def test_b10_readings_are_in_the_models_own_types(
    name: str, loaded_within: dict[str, HeadModel]
) -> None:
    model = hs.load(llama())
    wanted = np.asarray(READINGS[name](model))
    for around, enter in AROUND.items():
        loaded = loaded_within[around]
        with enter():
            found = [np.asarray(READINGS[name](one)) for one in (model, loaded)]
        for one in found:
            np.testing.assert_allclose(one, wanted, atol=2e-5, rtol=1e-4, err_msg=around)
        np.testing.assert_allclose(np.asarray(READINGS[name](loaded)), wanted, atol=2e-5, rtol=1e-4)


def test_b10_readings_leave_the_shared_models_as_they_were(
    loaded_within: dict[str, HeadModel],
) -> None:
    whole = hs.load(llama()).digest()
    assert {model.digest() for model in loaded_within.values()} == {whole}


def test_b10_an_edited_pattern_is_computed_for_the_edited_heads_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from headscope.models.attention import AttentionCall
    from headscope.models.hf import passes

    shapes: list[tuple[int, ...]] = []
    rows = AttentionCall.rows

    def noted(self: AttentionCall, positions: Tensor) -> Any:
        found = rows(self, positions)
        shapes.append(tuple(found.pattern.shape))
        return found

    for family in ("llama", "gemma2", "gpt_oss"):
        model = hs.load(build(family), check=False)
        donors = hs.ablation.head_values(model, X.flip(0), site="pattern")
        edits = [
            hs.edits.freeze_pattern(["L1H1", "L1H3"], donors),
            hs.edits.scale("L1H3", 0.5, site="pattern"),
        ]
        whole = model.forward(X, edits=[Whole(one) for one in edits])
        with monkeypatch.context() as patch:
            patch.setattr(AttentionCall, "rows", noted)
            patch.setattr(passes, "_EDITED_ENTRIES", 4 * 2 * 12 * 5)  # five queries at a time
            shapes.clear()
            found = model.forward(X, edits=edits)
        torch.testing.assert_close(found, whole)
        assert {s[1] for s in shapes if s[1] != 4} == {2}, shapes
        assert max(s[2] for s in shapes if s[1] == 2) == 5


class Whole:
    """An edit that does not say which heads it touches, so that it sees the whole pattern."""

    def __init__(self, edit: hs.edits.HeadEdit) -> None:
        self.edit, self.site, self.layers = edit, edit.site, edit.layers

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        return self.edit(layer, value)


# --- B11: budgets and gradients ------------------------------------------------------------------


def test_b11_a_budget_that_changes_between_layers_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hs.load(llama())
    names = ["previous_token", "entropy", "attention_distance"]
    wanted = hs.score(model, PROBE, names, progress=False)
    sizes = iter(range(5000, 10**6, 1777))
    engine = importlib.import_module("headscope.scoring.score")  # its package has a function score
    monkeypatch.setattr(engine, "chunk_bytes", lambda *_: next(sizes))
    found = hs.score(model, PROBE, names, progress=False, batch_size=2)
    for name in names:
        np.testing.assert_allclose(found[name].mean, wanted[name].mean, atol=1e-6)
        np.testing.assert_allclose(found[name].p_value, wanted[name].p_value, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_b11_a_pass_tracks_no_gradient_unless_asked(family: str) -> None:
    model = hs.load(build(family), check=False)
    assert not model.forward(X).requires_grad
    with torch.enable_grad():
        assert not model.forward(X).requires_grad
    with torch.no_grad():
        assert model.forward(X, grad=True).requires_grad
        assert not torch.is_grad_enabled()


def test_b11_of_finished_batches_only_the_sums_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, most = hs.load(llama()), [], 0
    start = Accumulator.__post_init__

    def noted(self: Accumulator) -> None:
        nonlocal most
        start(self)
        made.append(ref(self))
        gc.collect()
        most = max(most, sum(one() is not None for one in made))

    monkeypatch.setattr(Accumulator, "__post_init__", noted)
    hs.score(model, PROBE, ["previous_token"], progress=False, batch_size=1)
    assert len(made) >= 4
    assert most <= 2


def test_b11_weights_are_digested_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = hs.load(llama()), []
    digest = type(model).digest
    monkeypatch.setattr(type(model), "digest", lambda self: calls.append(1) or digest(self))
    hs.score(model, progress=False)
    assert len(calls) == 1


# --- B12: out of memory --------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_b12_running_out_of_memory_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    from headscope.models.hf.replay import Replay

    model = hs.load(llama())
    run, left = Replay.run, [times]

    def failing(self: Replay, *args: Any, **kwargs: Any) -> Tensor | None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Replay, "run", failing)
    if times == 2:  # said, and not remembered
        with pytest.raises(torch.OutOfMemoryError):
            ablated(model)
    found = hs.ablate_heads(model, PROBE, LOSS, "zero", progress=False)
    assert found.provenance.checks["engine"] == "suffix replay"


def test_b12_plans_die_with_their_model_and_know_padding() -> None:
    from headscope.ablation.engine import _ENGINES

    model = hs.load(llama())
    ablated(model)
    real = torch.ones_like(PROBE.real)
    real[0, :3] = False
    padded = hs.probes.from_tokens(X, real)
    hs.ablate_heads(model, padded, LOSS, "zero", heads=["L0H0"], progress=False)
    assert {key[0] for key in _ENGINES[model]} == {False, True}
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_b12_memory_is_given_back_outside_of_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from importlib import import_module

    held: list[bool] = []
    for place in ("headscope.capture", "headscope.ablation.engine", "headscope.retrieval.follow"):
        note = lambda: held.append(sys.exc_info()[1] is not None)  # noqa: E731
        monkeypatch.setattr(import_module(place), "free_cached_memory", note)
    model, left = hs.load(llama()), [2]
    run = type(model).run

    def failing(self: Any, batch: Any, **options: Any) -> Tensor | None:
        if left[0] and len(batch.tokens) > 1:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: Tensor | None = run(self, batch, **options)
        return found

    wanted = scored(model)
    monkeypatch.setattr(type(model), "run", failing)
    np.testing.assert_allclose(scored(model), wanted, atol=1e-6)
    assert held == [False, False]
    assert memory.is_out_of_memory(torch.OutOfMemoryError())


# --- B13: digests --------------------------------------------------------------------------------


def test_b13_a_shuffle_between_all_samples_changes_the_digest() -> None:
    weight = torch.randn(300, 300)
    flat = weight.clone().flatten()
    kept = torch.zeros(90_000, dtype=torch.bool)
    kept[:: 90_000 // 4096] = True
    kept[:: 90_000 // 64] = True
    moved = (~kept).nonzero().squeeze(1)
    flat[moved] = flat[moved[torch.randperm(len(moved))]]
    assert weight_digest({"a": weight}) != weight_digest({"a": flat.view(300, 300)})


def test_b13_a_models_digest_sees_what_torch_does_not_count() -> None:
    module = llama()
    model = hs.load(module)
    first = model.digest()
    weight = module.model.layers[1].mlp.up_proj.weight
    weight.data[7, [3, 5]] = weight.data[7, [5, 3]].clone()
    assert model.digest() != first
    weight.data[7, [3, 5]] = weight.data[7, [5, 3]].clone()
    assert model.digest() == first
    bridged = wrap_bridge(bridge_over(module))
    assert bridged.digest() == first


# --- B14: options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: hs.ablate_heads(m, PROBE, LOSS, "zero", steps=-3), "hs.estimate_heads"),
        (lambda m: hs.ablate_heads(m, PROBE, LOSS, "mean", baseline="zero"), "hs.estimate_heads"),
        (lambda m: hs.ablate_heads(m, PROBE, LOSS, "mean", sample=3), "hs.screen_heads"),
        (lambda m: hs.ablate_heads(m, PROBE, LOSS, "attribution"), "hs.estimate_heads"),
        (lambda m: hs.ablate_heads(m, PROBE, LOSS, "screened"), "hs.screen_heads"),
        (lambda m: hs.ablate_groups(m, PROBE, LOSS, {"a": ["L0H0"]}, "attribution"), "estimate"),
        (lambda m: hs.ablate_heads(m, PROBE, LOSS, "zero", reference=PROBE), "leave reference"),
        (lambda m: hs.estimate_heads(m, PROBE, LOSS, baseline="no such thing"), "baseline"),
        (lambda m: hs.estimate_heads(m, PROBE, LOSS, steps=-3), "steps=1 or more"),
        (lambda m: hs.estimate_heads(m, PROBE, LOSS, baseline="screened"), "hs.screen_heads"),
        (lambda m: hs.screen_heads(m, PROBE, LOSS, top=-1), "top >= 1"),
        (lambda m: hs.screen_heads(m, PROBE, LOSS, sample=-5), "sample >= 0"),
        (lambda m: hs.screen_heads(m, PROBE, LOSS, top=True), "top=True"),
    ],
)
def test_b14_options_that_mean_nothing_are_refused_before_any_pass(
    call: Callable[[Any], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hs.load(llama())
    monkeypatch.setattr(type(model), "run", lambda *_, **__: pytest.fail("a pass ran"))
    with pytest.raises(hs.HeadscopeError, match=said):
        call(model)


def test_b14_estimating_and_screening_are_functions_of_their_own() -> None:
    model = hs.load(llama())
    options: Any = {"baseline": "zero", "progress": False}
    estimate = hs.estimate_heads(model, PROBE, LOSS, steps=2, **options)
    screened = hs.screen_heads(model, PROBE, LOSS, top=2, sample=1, **options)
    exact = ablated(model)
    measured = ~np.isnan(screened.mean)
    assert measured.sum() == 3
    np.testing.assert_allclose(screened.mean[measured], exact[measured], atol=1e-5)
    assert estimate.provenance.probe["steps"] == 2
    assert estimate.provenance.probe["baseline"] == "zero"
