"""The whole public API on a device that is not the CPU: the same numbers as on the CPU."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import headscope as hs
from headscope.models.protocol import HeadModel, lacks
from headscope.retrieval.forms import Retrieval
from tests.devices import standin
from tests.models import vision_language

# What a result says of where and how it was computed, which differs by device.
_ELSEWHERE = {"provenance", "device", "seconds", "checks", "model", "module"}
# Quotients by a spread that may be rounding alone; what they are made from is compared.
_ELSEWHERE |= {"effect_size", "p_value", "z_score"}
_CLOSE = 1e-4


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """torch with the stand-in device; gradients in this thread, for the others end with a crash."""
    standin.install()
    with torch.autograd.set_multithreading_enabled(False), standin.without_float64():
        yield


@cache
def model_on(name: str, device: str) -> HeadModel:
    """A bundled model, or a tiny one that reads pictures, on one of the two devices."""
    if name == "llava":
        return hs.load(vision_language.model_of(name), device=device, check=False)
    return hs.load(name, device=device)


@cache
def probe_of(kind: str) -> hs.Probe:
    """Small probes, on the CPU as probes are."""
    model = model_on("tiny-llama", "cpu")
    return {
        "repeated": lambda: hs.probes.repeated_tokens(model, length=8, batch=3),
        "names": lambda: hs.probes.pairs(model, "ioi", batch=3),
        "needle": lambda: hs.probes.needle(model, lengths=64, depths=2, per_cell=1),
        "other needle": lambda: hs.probes.needle(model, lengths=64, depths=2, per_cell=1, seed=1),
        "text": lambda: hs.probes.text(model, ["The cat slept. The dog slept.", "One day"]),
    }[kind]()


REPEATED, NAMES, NEEDLE = "repeated", "names", "needle"
_LOSS, _DIFFERENCE = hs.metrics.loss, hs.metrics.logit_difference


def _all_scores(model: HeadModel, kind: str, probe: str) -> hs.HeadTable:
    """All scorers that are meant for one kind of probe."""
    names = [
        name
        for name, scorer in hs.scorers.CATALOGUE.items()
        if getattr(scorer.probe, "name", "") == kind
        and not any(lacks(model, need) for need in scorer.needs)
    ]
    return hs.score(model, probe_of(probe), names)


def _factor_scores(model: HeadModel) -> list[Any]:
    circuits = hs.circuits
    ov, qk, words = circuits.ov(model), circuits.qk(model), circuits.Dictionary(model)
    ids = torch.arange(50, 60)
    return [
        circuits.read_alignment(ov, words),
        circuits.write_alignment(ov, words),
        circuits.copying_eigenvalues(ov, words),
        circuits.matching_eigenvalues(qk, words),
        circuits.copying_share(ov, words, ids),
        circuits.matching_share(qk, words, ids),
        circuits.symmetric_share(ov),
        circuits.random_edge(ov),
        circuits.ov(model).svd().S,
        circuits.qk(model).svd().S,
        circuits.with_bias(qk).svd().S,
    ]


def _masked(model: HeadModel) -> list[list[int]]:
    with hs.mask_heads(model, ["L2H0", "L2H1"]):
        ids = probe_of(REPEATED).tokens.to(model.device)
        out = model.module.generate(
            ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    return out.tolist()


def _decore_processor(model: HeadModel) -> list[list[int]]:
    out = model.module.generate(
        probe_of(REPEATED).tokens.to(model.device),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[hs.retrieval.DeCoReProcessor(model, ["L2H0"])],
    )
    return out.tolist()


def _pruned(model: HeadModel) -> Any:
    smaller = hs.load(hs.prune(model, ["L0H1", "L1H0"]))
    return hs.score(smaller, probe_of(REPEATED), ["induction", "entropy"])


def _faithfulness(model: HeadModel) -> Any:
    probe = hs.retrieval.contradictions(model, examples=4)
    return hs.retrieval.faithfulness(model, probe, ["L2H1"], alphas=[0.5])


def _needle_curve(model: HeadModel) -> Any:
    scores = hs.retrieval.forced(model, probe_of(NEEDLE))
    return hs.retrieval.masking_curve(model, probe_of("other needle"), scores, counts=[0, 6])


def _curve(model: HeadModel) -> Any:
    probe = probe_of(REPEATED)
    order = hs.pruning.one_shot(hs.pruning.gradient_importance(model, probe))
    return hs.pruning.pruning_curve(
        model, probe, orders={"importance": order}, counts=[0, 4], random=2
    )


Case = Callable[[HeadModel], Any]
CASES: dict[str, Case] = {
    "score, repeated tokens": lambda m: _all_scores(m, "repeated_tokens", REPEATED),
    "score, text": lambda m: _all_scores(m, "text", "text"),
    "score, names": lambda m: _all_scores(m, "ioi", NAMES),
    "score, needle": lambda m: _all_scores(m, "needle", NEEDLE),
    "score, small chunks": lambda m: hs.score(
        m, probe_of(REPEATED), ["induction", "entropy"], max_tokens_per_chunk=12, batch_size=2
    ),
    "similarity of heads": lambda m: hs.similarity.heads(m, probe_of("text"), "pattern"),
    "similarity of outputs": lambda m: hs.similarity.heads(m, probe_of(REPEATED), "cka"),
    "collect": lambda m: hs.capture.collect(m, probe_of(REPEATED)),
    "ablate, zero": lambda m: hs.ablate_heads(m, probe_of(REPEATED), _LOSS, "zero"),
    "ablate, mean": lambda m: hs.ablate_heads(m, probe_of(NAMES), _DIFFERENCE, "mean"),
    "ablate, resample": lambda m: hs.ablate_heads(
        m, probe_of(REPEATED), hs.metrics.kl_divergence, "resample"
    ),
    "ablate, uniform": lambda m: hs.ablate_heads(
        m, probe_of(NAMES), hs.metrics.answer_log_prob, "uniform"
    ),
    "ablate, several": lambda m: hs.ablate_groups(
        m, probe_of(REPEATED), _LOSS, {"none": [], "layer 0": ["L0H0", "L0H1"]}
    ),
    "ablate, cumulatively": lambda m: hs.ablate_cumulatively(
        m, probe_of(REPEATED), _LOSS, ["L0H0", "L1H2"]
    ),
    "interactions": lambda m: hs.interactions(m, probe_of(REPEATED), _LOSS, ["L0H0", "L1H2"]),
    "head means": lambda m: hs.ablation.head_means(m, probe_of("text")),
    "patch": lambda m: hs.patch_activations(m, probe_of(NAMES), _DIFFERENCE),
    "patch, pattern by position": lambda m: hs.patch_activations(
        m, probe_of(NAMES), _DIFFERENCE, ("layer", "position"), site="key", direction="denoise"
    ),
    "path patch": lambda m: hs.path_patch(m, probe_of(NAMES), _DIFFERENCE, receivers="L2H1"),
    "circuit scores": lambda m: hs.circuits.score(m, tokens=32),
    "circuit factors": _factor_scores,
    "flow, rollout": lambda m: [
        hs.flow.rollout(m, probe_of(REPEATED)).matrix,
        hs.flow.max_flow(m, probe_of("text"), at="last").matrix,
        hs.flow.through_heads(m, probe_of(REPEATED), "first_copy").mean,
    ],
    "flow, vectors": lambda m: [
        hs.flow.alti(m, probe_of("text")).matrix,
        hs.flow.norms(m, probe_of("text")).mixing_ratio,
        hs.flow.norms(m, probe_of("text")).norm_share.mean,
        hs.flow.alti_logits(m, [5, 9, 5, 9], target=5).values,
    ],
    "flow, routes": lambda m: [
        hs.flow.routes(m, [5, 9, 5, 9, 7], part_threshold=0.0).head_flow,
        hs.flow.route_scores(m, probe_of("text"), part_threshold=0.0)["flow"].mean,
    ],
    "compositions": lambda m: [
        hs.circuits.composition(m, "K"),
        hs.circuits.composition(m, "Q", fold_norm=False),
        hs.circuits.component_composition(m, "V", components=2),
        hs.circuits.direction_composition(m, "L0H0", "L1H0", "Q"),
        hs.circuits.subspace_affinity(m, "K"),
        hs.circuits.random_composition(m),
    ],
    "paths": lambda m: [path.strength for path in hs.circuits.strongest_paths(m, k=3)],
    "spectra": lambda m: [hs.circuits.spectra(m, "QK"), hs.circuits.spectra(m, "OV")],
    "relations": lambda m: hs.circuits.relation_scores(m),
    "mappings": lambda m: hs.circuits.salient_mappings(m, "L2H1", sources=3, targets=2),
    "vocabulary": lambda m: hs.circuits.vocabulary_words(m, directions=1, tokens=2),
    "survey": lambda m: hs.circuits.survey(m, tokens=32, paths=2),
    "trace": lambda m: [
        edge.share for edge in hs.circuits.trace(m, probe_of(REPEATED).tokens[0], "L2H1", 15, 6)
    ],
    "logit lens": lambda m: hs.lens.logit_lens(m, [5, 9, 5, 9]),
    "head lens": lambda m: hs.lens.head_lens(m, [5, 9, 5, 9], k=3),
    "attribution": lambda m: list(hs.lens.attribute(m, [5, 9, 5, 9], target=5, foil=9)),
    "head attribution": lambda m: hs.lens.head_attribution(m, probe_of(NAMES)),
    "tuned lens": lambda m: hs.lens.tuned_lens(m, probe_of(REPEATED), steps=2),
    "attention lens": lambda m: hs.lens.attention_lens(
        m, probe_of(REPEATED), layers=[0], rank=2, steps=2
    ),
    "shortcuts": lambda m: hs.lens.linear_shortcuts(m, probe_of(REPEATED)).report,
    "retrieval, decoded": lambda m: hs.retrieval.decoded(m, probe_of(NEEDLE)),
    "retrieval, forced": lambda m: hs.retrieval.forced(m, probe_of(NEEDLE)),
    "retrieval, masks": _needle_curve,
    "retrieval, need": lambda m: hs.retrieval.need(m, probe_of(NEEDLE), sink=2, recent=8),
    "in-context score": lambda m: hs.retrieval.in_context_score(
        m, hs.probes.repeated_tokens(m, length=20, batch=2), early=(5, 15), late=(25, 35)
    ),
    "influence": lambda m: hs.retrieval.influence(
        m, ["The cat slept. The dog slept.", "One day"], ["L2H1"]
    ),
    "faithfulness": _faithfulness,
    "decore": lambda m: hs.retrieval.decore(m, "The code of the red door is", ["L2H0"]),
    "decore in generate": _decore_processor,
    "generate": lambda m: hs.retrieval.generate(m, ["One day the", "Every night"], new_tokens=3),
    "generate, masked": _masked,
    "prune": _pruned,
    "pruning curve": _curve,
    "gates": lambda m: hs.pruning.learn_gates(m, probe_of(REPEATED), steps=3),
    "baselines": lambda m: [
        hs.pruning.weight_norm(m),
        hs.pruning.output_norm(m, probe_of(REPEATED)),
        hs.pruning.confidence(m, probe_of(REPEATED)),
    ],
    "importance": lambda m: hs.pruning.ablation_importance(m, probe_of(REPEATED)),
    "greedy": lambda m: hs.pruning.greedy(m, probe_of(REPEATED), count=2),
    "kinds": lambda m: hs.kinds.survey(m, ["induction", "positional", "name_mover"]).values,
    "training, noisy gates": lambda m: hs.training.variational_gates(
        m, probe_of(REPEATED), steps=2
    ),
    "training, mixture": lambda m: hs.training.mixture(m, probe_of(REPEATED), steps=2),
    "steering": lambda m: hs.steering.compare(
        m, probe_of(NAMES), hs.steering.head_means(m, probe_of(NAMES)), ["L1H0"]
    ),
    "compare": lambda m: hs.compare(m, m, by="weights", scorers=["induction"]),
    "explain": lambda m: hs.explain("L2H1", m).card,
    "view": lambda m: hs.attention_view(m, "the cat sat", heads=["L2H1"]) and None,
}
OF_ROTARY: dict[str, Case] = {
    "rotary": lambda m: hs.retrieval.rotary_contributions(m, probe_of(NEEDLE)),
    "qk": lambda m: [
        hs.circuits.qk(m, offset=1).svd().S,
        hs.circuits.qk_content(m, range(1, 9)).svd().S,
        *(band.svd().S for band in hs.circuits.qk_bands(m)[:2]),
    ],
}


def _syntax(model: HeadModel) -> list[Any]:
    """Heads of relations and an attention probe, of a sentence that is read eight times."""
    words = ["the", "red", "door", "of", "the", "house"]
    tree = [2, 2, -1, 5, 5, 2], ["det", "amod", "root", "case", "det", "nmod"]
    bank = hs.syntax.treebank(model, [hs.syntax.Sentence.of_words(words, *tree)] * 8)
    probe = hs.syntax.attention_probe(model, bank, epochs=1)
    return [hs.syntax.heads(model, bank, least=2).table, probe.uas]


def _images(model: HeadModel) -> hs.Probe:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return hs.probes.images(model, pixels, labels=[0, 1, 1])


def _sources(model: HeadModel) -> hs.Probe:
    return hs.probes.translation(model, ["reverse moon key boat"] * 2, ["boat key moon"] * 2)


def _read_in_pictures(model: HeadModel) -> list[Any]:
    probe = hs.probes.from_batch(vision_language.inputs_of("llava"))
    keys = hs.vision.image_keys(model, probe)
    seen = keys.evidence([(0, 0, 4, 4), (4, 4, 8, 8)])
    looks = hs.vision.image_attention(model, probe, keys)
    return [
        keys.boxes,
        looks.weights,
        looks.gaze(seen),
        hs.vision.ocr_heads(model, probe, seen, [[5, 6], [7]], keys).score,
        hs.vision.ocr_heads(model, probe, seen, [[5], [7]], keys, form="decoded", recall=-1).reads,
    ]


OF_OTHER_MODELS: dict[tuple[str, str], Case] = {
    ("tiny-gpt2", "syntax"): _syntax,
    ("tiny-bert", "ablate, masked"): lambda m: hs.ablate_heads(
        m, hs.probes.masked(m, ["( [ ] ) ( )", "[ ( ) ]"]), _LOSS, "zero"
    ),
    ("tiny-vit", "importance"): lambda m: hs.vision.importance(m, _images(m)),
    ("tiny-vit", "hops"): lambda m: hs.vision.hops(m, _images(m)),
    ("tiny-vit", "class space"): lambda m: hs.vision.class_space(m, _images(m)),
    ("tiny-vit", "contributions"): lambda m: hs.vision.contributions(m, _images(m)),
    ("tiny-vit", "maps"): lambda m: hs.vision.maps(m, _images(m)).weights,
    ("tiny-marian", "decoder lens"): lambda m: hs.lens.decoder_lens(m, _sources(m), length=4).texts,
    ("tiny-marian", "source contribution"): lambda m: hs.flow.source_contribution(m, _sources(m)),
    ("tiny-marian", "alignment"): lambda m: hs.alignment.find(m, _sources(m)),
    ("tiny-marian", "ablate, cross"): lambda m: hs.ablate_heads(
        m.stack("cross"), _sources(m), hs.metrics.answer_log_prob, "zero"
    ),
    ("llava", "pictures"): _read_in_pictures,
}
# Grouped heads and rotary positions: where they make a difference to what runs.
_ALSO = (
    *("score, repeated tokens", "score, needle", "ablate, mean", "path patch"),
    *("circuit factors", "compositions", "retrieval, forced", "generate, masked", "gates"),
)
NAMED = [("tiny-gpt2", name) for name in CASES] + [
    ("tiny-llama", name) for name in (*OF_ROTARY, *_ALSO)
]
NAMED += OF_OTHER_MODELS


@pytest.mark.parametrize(("name", "case"), NAMED)
def test_same_numbers_as_on_the_cpu(name: str, case: str) -> None:
    run = OF_OTHER_MODELS.get((name, case)) or (CASES | OF_ROTARY)[case]
    here, there = (dict(_leaves(run(model_on(name, one)))) for one in ("cpu", standin.NAME))
    assert here.keys() == there.keys()
    for place, value in here.items():
        _assert_same(place, value, there[place])


def _assert_same(place: str, one: Any, other: Any) -> None:
    if isinstance(one, np.ndarray) and one.dtype.kind in "fciub":
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=_CLOSE, err_msg=place)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(other, one, err_msg=place)
    else:
        assert other == one, place


def _leaves(value: Any, place: str = "result") -> Iterator[tuple[str, Any]]:
    """All numbers and words of a result, by where they are in it."""
    if isinstance(value, torch.Tensor):
        yield place, value.detach().cpu().numpy()
    elif (
        isinstance(value, np.ndarray) or value is None or isinstance(value, str | bool | frozenset)
    ):
        yield place, value
    elif isinstance(value, int | float | np.generic):
        yield place, np.asarray(value)
    elif isinstance(value, pd.DataFrame):
        yield from _leaves(value.to_dict("list"), place)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{place}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, Retrieval | hs.Probe):
        for field in dataclasses.fields(value):
            if field.name not in _ELSEWHERE:
                yield from _leaves(getattr(value, field.name), f"{place}.{field.name}")
    elif isinstance(value, list | tuple):
        for at, one in enumerate(value):
            yield from _leaves(one, f"{place}[{at}]")
    elif isinstance(value, Retrieval):
        yield from _leaves(value.by_set, f"{place}.by_set")
    elif not isinstance(value, hs.Probe):
        raise AssertionError(f"{place} is a {type(value).__name__}: say how it is compared")


def test_sweep_cells(tmp_path: Path) -> None:
    tables = []
    for device in ("cpu", standin.NAME):
        config = hs.sweeps.SweepConfig(
            name="devices",
            models=["tiny-gpt2"],
            probes=[{"kind": "repeated_tokens", "length": 6, "batch": 3}],
            edits=["zero"],
            metrics=["loss"],
            device=device,
        )
        hs.sweeps.run_sweep(config, tmp_path / device, progress=False)
        tables.append(hs.sweeps.read(tmp_path / device).to_pandas())
    np.testing.assert_allclose(tables[0]["effect"], tables[1]["effect"], atol=_CLOSE)
