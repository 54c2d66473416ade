"""Benchmark on compiled models: does a method rank the true items first?

Every method answers one question about a model, e.g. which heads do induction, which heads the
output depends on, or which head reads from which. Compiled models have known answers, so
headscope's methods, and your own, can be scored against them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from headscope import ablation, circuits, edges, flow, lens, metrics, pruning
from headscope.base.arguments import checked
from headscope.base.files import Saved, Stored
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown, Tabular
from headscope.compiled.compiled import BuildOptions, Compiled, compiled
from headscope.compiled.library import LIBRARY
from headscope.compiled.program import Head
from headscope.errors import HeadscopeError, InputError, nearest
from headscope.heads import HeadIndex
from headscope.probes import Probe, from_tokens
from headscope.scoring import score

if TYPE_CHECKING:
    import pandas

Item = Any  # a head, an edge as (source, target, slot), a pair of heads
Found = Mapping[Item, float] | Float[np.ndarray, "layer head"]


@dataclass(frozen=True, eq=False)
class Case:
    """A compiled model with texts for methods to use.

    Attributes:
        name: name of the program and its build options.
        made: compiled model with its ground truth.
        probe: texts with the program's own answers as targets, paired with other texts; answers
            that mix several tokens are left out.
    """

    name: str
    made: Compiled
    probe: Probe

    @property
    def repeated(self) -> Probe:
        """Probe of random words repeated after the BOS, for scores of repetition."""
        program = self.made.program
        half = (program.length - 1) // 2
        drawn = np.random.default_rng(1)
        words = drawn.integers(1, program.tokens, (8, half))
        if program.tokens > half:
            words = np.stack([1 + drawn.permutation(program.tokens - 1)[:half] for _ in range(8)])
        start = np.zeros((8, 1), int)
        return from_tokens(torch.from_numpy(np.concatenate([start, words, words], 1)))

    @property
    def needle(self) -> Probe:
        """Probe with a marker (token 1) among random words; the word after it is the answer."""
        program = self.made.program
        drawn = np.random.default_rng(2)
        tokens = drawn.integers(2, program.tokens, (8, program.length))
        tokens[:, 0] = 0
        at = drawn.integers(1, program.length // 2, 8)
        rows, along = np.arange(8), np.arange(program.length)
        tokens[rows, at] = 1
        needle = along == at[:, None] + 1
        later = along > at[:, None] + 1
        answers = np.where(later, tokens[rows, at + 1][:, None], -1)
        marks = {"needle": needle, "needle_answer": needle, "answering": later, "question": later}
        return from_tokens(
            torch.from_numpy(tokens),
            marks={name: torch.from_numpy(mark) for name, mark in marks.items()},
            targets=torch.from_numpy(answers),
        )

    @property
    def names(self) -> Probe:
        """Probe with two names, one of them repeated: ``BOS S w IO w S w w``."""
        drawn = np.random.default_rng(3)
        tokens = drawn.integers(self.made.program.tokens - 2, self.made.program.tokens, (8, 8))
        pairs = np.stack([1 + drawn.permutation(4)[:2] for _ in range(8)])
        tokens[:, 0], tokens[:, 1], tokens[:, 5], tokens[:, 3] = 0, *pairs[:, [0, 0, 1]].T
        places = {"s1": 1, "s1_next": 2, "io": 3, "s2": 5, "end": 7}
        marks = {name: torch.arange(8).eq(at).expand(8, 8).clone() for name, at in places.items()}
        return from_tokens(torch.from_numpy(tokens), marks=marks)


@dataclass(frozen=True)
class Method:
    """A method that answers a question about a model.

    Attributes:
        name: name of the method.
        asks: question that it answers, one of :data:`QUESTIONS`.
        answer: maps a case to a number for every head ``[layer head]``, or by item; larger means a
            stronger yes. Missing items count as the lowest.
    """

    name: str
    asks: str
    answer: Callable[[Case], Found]


@dataclass(frozen=True)
class Question:
    """A question with a known answer from the program.

    Attributes:
        text: question in words.
        true: items in the answer.
        others: candidate items not in the answer.
    """

    text: str
    true: Callable[[Compiled], Iterable[Item]]
    others: Callable[[Compiled], Iterable[Item]]


@dataclass(frozen=True)
class Trial(Stored):
    """Result of one method on one model.

    Attributes:
        method: name of the method.
        asks: question that was asked.
        model: name of the case.
        auroc: share of pairs of a true and another item in which the true one is ranked higher;
            ties count against the method. NaN if it refused.
        n_true: number of true items.
        n_others: number of other items.
        seconds: run time of the method.
        refused: why it gave no answer; empty if it gave one.
    """

    method: str
    asks: str
    model: str
    auroc: float
    n_true: int
    n_others: int
    seconds: float
    refused: str = ""

    @property
    def exact(self) -> bool:
        """Whether every true item is ranked above every other."""
        return self.auroc == 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Benchmark(Saved, Shown, Tabular):
    """Results of methods on compiled models.

    Attributes:
        trials: one trial per method and model to which its question applies.
    """

    trials: tuple[Trial, ...]

    @cached_property
    def _by_method(self) -> dict[tuple[str, str], list[Trial]]:
        found: dict[tuple[str, str], list[Trial]] = defaultdict(list)
        for trial in self.trials:
            found[trial.asks, trial.method].append(trial)
        return dict(found)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per trial."""
        import pandas

        return pandas.DataFrame([{**vars(one), "exact": one.exact} for one in self.trials])

    def by_method(self) -> "pandas.DataFrame":
        """One row per question and method, best first.

        Columns:
            ``models``: number of models with this question; ``refused``: number of these without an
            answer. ``auroc``: median over the others; ``worst``: the lowest, and ``worst_model``
            its model. ``exact``: share of answered models on which all true items rank above all
            others. ``seconds``: median.
        """
        import pandas

        rows = []
        for (asks, name), trials in self._by_method.items():
            told = [one for one in trials if not one.refused]
            worst = min(told, key=lambda one: one.auroc, default=None)
            rows.append({
                "question": asks,
                "method": name,
                "models": len(trials),
                "refused": len(trials) - len(told),
                "auroc": float(np.median([one.auroc for one in told])) if told else float("nan"),
                "worst": float("nan") if worst is None else worst.auroc,
                "worst_model": "" if worst is None else worst.model,
                "exact": float(np.mean([one.exact for one in told])) if told else float("nan"),
                "seconds": float(np.median([one.seconds for one in trials])),
            })  # fmt: skip
        table = pandas.DataFrame(rows)
        order = {name: at for at, name in enumerate(QUESTIONS)}
        table["_at"] = table["question"].map(order)
        table = table.sort_values(["_at", "auroc", "exact"], ascending=[True, False, False])
        return table.drop(columns="_at").reset_index(drop=True)

    def to_markdown(self) -> str:
        """:meth:`by_method` as a Markdown table."""
        lines = [
            "| question | method | models | median AUROC | lowest | exact | refused |",
            "|---|---|--:|--:|---|--:|--:|",
        ]
        for row in self.by_method().itertuples():
            lowest = f"{row.worst:.2f} ({row.worst_model})" if row.worst < 1 else "1.00"
            lines.append(
                f"| {row.question} | {row.method} | {row.models} | {row.auroc:.2f} | {lowest} "
                f"| {row.exact:.0%} | {row.refused} |"
            )
        return "\n".join(lines)

    def glance(self) -> Glance:
        """Show the worst methods."""
        table = self.by_method().sort_values("auroc")
        models = {one.model for one in self.trials}
        return Glance(
            "benchmark on compiled models",
            [f"{len(table)} methods", f"{len(models)} models", "lowest first"],
            ("question", "method", "median AUROC", "exact"),
            [
                (row.question, row.method, f"{row.auroc:.2f}", f"{row.exact:.0%}")
                for row in table.itertuples()
            ],
            hint="result.by_method(), result.to_pandas(), print(result.to_markdown())",
        )


# Programs and build options: both families, rotated bases, grouped heads and noise heads, so that
# every case has distractors.
CASES: tuple[tuple[str, BuildOptions], ...] = (
    ("copy", {"noise_heads": 2}),
    ("previous", {"noise_heads": 2, "rotation_seed": 1}),
    ("two back", {"noise_heads": 2}),
    ("two back", {"noise_heads": 1, "family": "llama", "rotation_seed": 13}),
    ("reverse", {"noise_heads": 1}),
    ("duplicate", {"noise_heads": 2}),
    ("duplicate", {"noise_heads": 1, "rotation_seed": 2}),
    ("induction", {"noise_heads": 1}),
    ("induction", {"noise_heads": 2, "rotation_seed": 3}),
    ("induction", {"noise_heads": 1, "family": "llama"}),
    ("induction", {"noise_heads": 1, "family": "llama", "kv_group": 2, "rotation_seed": 4}),
    ("recall", {"noise_heads": 2, "rotation_seed": 5}),
    ("recall", {"noise_heads": 1, "family": "llama", "kv_group": 2}),
    ("pointer", {"noise_heads": 1}),
    ("pointer", {"noise_heads": 2, "rotation_seed": 6}),
    ("trigram", {"noise_heads": 2, "rotation_seed": 7}),
    ("trigram", {"noise_heads": 1, "family": "llama"}),
    ("successor", {"noise_heads": 2}),
    ("largest", {"noise_heads": 2, "rotation_seed": 8}),
    ("sort", {"noise_heads": 2, "rotation_seed": 14}),
    ("sort", {"noise_heads": 1, "family": "llama"}),
    ("regression", {"noise_heads": 1}),
    ("regression", {"noise_heads": 1, "family": "llama", "kv_group": 2}),
    ("dyck 2", {"noise_heads": 1}),
    ("name mover", {"noise_heads": 2}),
    ("indirect object", {"noise_heads": 1}),
    ("indirect object", {"noise_heads": 2, "rotation_seed": 9}),
    ("greater than", {"noise_heads": 2}),
    ("planted retrieval", {"noise_heads": 1}),
    ("planted retrieval", {"noise_heads": 2, "rotation_seed": 10}),
    ("bystanders", {"noise_heads": 1}),
    ("bystanders", {"noise_heads": 2, "rotation_seed": 11}),
    ("redundant induction", {"noise_heads": 1}),
    ("redundant induction", {"noise_heads": 1, "family": "llama", "rotation_seed": 12}),
)


@checked
def benchmark(
    methods: Sequence[Method | str] | None = None,
    cases: Sequence[tuple[str, BuildOptions]] | None = None,
    *,
    extra: Sequence[Method] = (),
    batch: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Benchmark:
    """Score methods against the truth of compiled models.

    A method runs on every model to which its question applies, i.e. with at least one true and one
    other item. Its score is the pessimistic AUROC of its ranking: 0.5 for a random ranking, and 0
    if all items have the same value.

    Args:
        methods: methods to run, as values or names from :data:`METHODS`. Default: all of them.
        cases: library programs with options of :class:`headscope.compiled.Build`. Default:
            :data:`CASES`.
        extra: your own methods, in addition to ``methods``.
        batch: texts per model.
        seed: seed for the texts.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a method or program is unknown, or a method's answer has the wrong shape.

    Source:
        The programs follow Weiss et al. 2021 (RASP) and Lindner et al. 2023 (Tracr).

    Example:
        >>> found = hs.compiled.benchmark(["induction"], [("induction", {"noise_heads": 1})])
        >>> found.trials[0].auroc
        1.0
    """
    options = RunOptions(seed=seed, progress=progress)
    chosen = [*(METHODS.values() if methods is None else map(_method, methods)), *extra]
    for method in chosen:
        if method.asks not in QUESTIONS:
            raise InputError(nearest(method.asks, QUESTIONS, kind="question"))
    trials: list[Trial] = []
    asked = CASES if cases is None else tuple(cases)
    with options.track(float(len(asked) * len(chosen)), "benchmark") as advance:
        for name, build in asked:
            case = make_case(name, build, batch=batch, seed=seed)
            for method in chosen:
                trials += _trial(method, case)
                advance(1.0)
    return Benchmark(tuple(trials))


@checked
def make_case(name: str, build: BuildOptions, *, batch: int = 8, seed: int = 0) -> Case:
    """Compile a library program and draw its texts.

    Args:
        name: name of the program.
        build: options of :class:`headscope.compiled.Build`.
        batch: number of texts.
        seed: seed for the random draw.

    Raises:
        InputError: if there is no such program, or it does not fit the family.

    Example:
        >>> hs.compiled.make_case("induction", {"noise_heads": 1}).name
        'induction (noise heads 1)'
    """
    if name not in LIBRARY:
        raise InputError(nearest(name, LIBRARY, kind="program"))
    made = compiled(LIBRARY[name](), **build)
    clean, other = made.probe(batch, seed), made.probe(batch, seed + 1)
    shown = made.interpret(clean.tokens.numpy()).output
    answers = torch.from_numpy(np.where(shown.max(-1) > 0.99, shown.argmax(-1), -1))
    answers[:, 0] = -1  # the BOS
    probe = replace(clean, targets=answers, corrupt=replace(other, targets=answers))
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in build.items())
    return Case(f"{name} ({facts})" if facts else name, made, probe)


def pessimistic_auroc(true: Sequence[float], others: Sequence[float]) -> float:
    """AUROC of the true items' values, with ties counted as errors.

    Example:
        >>> pessimistic_auroc([3.0, 1.0], [1.0, 0.0])
        0.75
    """
    below = np.searchsorted(np.sort(np.asarray(others)), np.asarray(true), side="left")
    return float(below.mean() / len(others))


def _method(given: Method | str) -> Method:
    if isinstance(given, Method):
        return given
    if given not in METHODS:
        raise InputError(nearest(given, METHODS, kind="method"))
    return METHODS[given]


def _trial(method: Method, case: Case) -> list[Trial]:
    """One trial, or none if the question does not apply to the model."""
    question = QUESTIONS[method.asks]
    true = sorted(set(question.true(case.made)))
    others = sorted(set(question.others(case.made)) - set(true))
    if not true or not others:
        return []
    begin = time.perf_counter()
    refused, area = "", float("nan")
    try:
        values = _by_item(method, method.answer(case), [*true, *others])
        area = pessimistic_auroc(values[: len(true)], values[len(true) :])
    except HeadscopeError as error:
        refused = str(error)
    seconds = time.perf_counter() - begin
    return [
        Trial(method.name, method.asks, case.name, area, len(true), len(others), seconds, refused)
    ]


def _by_item(method: Method, answer: Found, items: Sequence[Item]) -> list[float]:
    """Values of items in order; missing ones come last."""
    if isinstance(answer, np.ndarray):
        if not all(isinstance(one, HeadIndex) for one in items) or answer.ndim != 2:
            raise InputError(
                f"the method {method.name!r} gave an array of shape {answer.shape}; the question "
                f"{method.asks!r} needs a number per item."
            )
        numbers = [float(answer[one.layer, one.head]) for one in items]
    else:
        numbers = [float(answer.get(one, np.nan)) for one in items]
    return [-np.inf if np.isnan(value) else value for value in numbers]


# Questions ---------------------------------------------------------------------------------------


def _heads(made: Compiled) -> Iterable[HeadIndex]:
    return made.model.shape.heads


def _of_role(role: str) -> Question:
    return Question(
        f"Which heads are {role.replace('_', ' ')} heads?",
        lambda made: made.truth.roles.get(role, ()),
        _heads,
    )


def _planted(made: Compiled, wanted: Callable[[Head], bool]) -> list[HeadIndex]:
    program = made.program
    return [program.addresses[head.output] for head in program.heads if wanted(head)]


def _is_copying(made: Compiled) -> list[HeadIndex]:
    shown = set(made.program.outputs)
    return _planted(made, lambda head: head.value == "token" and head.output in shown)


def _is_matching(made: Compiled) -> list[HeadIndex]:
    return _planted(
        made,
        lambda head: (head.query, head.key, head.predicate.name) == ("token", "token", "same"),
    )


def _edges_of(made: Compiled) -> list[tuple[str, str, str]]:
    return [(edge.source, edge.target, edge.slot) for edge in made.truth.edges]


def _all_edges(made: Compiled) -> Iterable[tuple[str, str, str]]:
    shape = made.model.shape
    wiring = edges.Wiring(shape.n_heads, (False,) * shape.n_layers)
    return [(edge.source, edge.target, edge.slot) for edge in wiring.edges]


def _composing(mode: str) -> Question:
    def pairs(made: Compiled) -> Iterable[tuple[HeadIndex, HeadIndex]]:
        heads = made.model.shape.heads
        return [(a, b) for a in heads for b in heads if a.layer < b.layer]

    slot = {"Q": "queries", "K": "keys", "V": "values"}[mode]
    return Question(
        f"Which {slot} read from which earlier head?",
        lambda made: made.truth.composition[mode],
        pairs,
    )


QUESTIONS: Mapping[str, Question] = {
    "previous token": _of_role("previous_token"),
    "current token": _of_role("current_token"),
    "duplicate token": _of_role("duplicate_token"),
    "induction": _of_role("induction"),
    "retrieval": _of_role("retrieval"),
    "S-inhibition": _of_role("s_inhibition"),
    "name mover": Question(
        "Which heads move the other name to the end?",
        lambda made: made.truth.roles["name_mover"] if "s_inhibition" in made.truth.roles else (),
        _heads,
    ),
    "copies": Question(
        "Which heads raise the logit of the token that they read?", _is_copying, _heads
    ),
    "matches": Question("Which heads match equal tokens by their weights?", _is_matching, _heads),
    "used": Question(
        "Which non-redundant heads does the output depend on?",
        lambda made: made.truth.used - made.truth.redundant,
        lambda made: set(_heads(made)) - made.truth.redundant,
    ),
    "redundant": Question(
        "Which redundant heads does the output depend on?",
        lambda made: made.truth.redundant,
        lambda made: set(_heads(made)) - made.truth.used,
    ),
    "edges": Question("Which node reads from which node?", _edges_of, _all_edges),
    "Q-composition": _composing("Q"),
    "K-composition": _composing("K"),
    "V-composition": _composing("V"),
}


# Methods -----------------------------------------------------------------------------------------


def _scored(name: str, texts: str = "repeated") -> Callable[[Case], Found]:
    """Method: a catalogue scorer on the case's texts."""

    def answer(case: Case) -> Found:
        return score(case.made.model, getattr(case, texts), [name], progress=False)[name].mean

    return answer


def _ablated(method: str) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        found = ablation.ablate_heads(
            case.made.model, case.probe, metrics.answer_log_prob, method, progress=False
        )
        return -found.mean

    return answer


def _estimated(baseline: str, steps: int) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        found = ablation.estimate_heads(
            case.made.model, case.probe, metrics.answer_log_prob,
            baseline=baseline, steps=steps, progress=False,
        )  # fmt: skip
        return -found.mean

    return answer


def _important(measure: Callable[[Case], Any]) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        values: np.ndarray = measure(case).mean
        return values

    return answer


def _edges_by(method: str, kind: str) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        return _edge_sizes(case, method, kind)

    return answer


def _edge_sizes(case: Case, method: str, kind: str) -> dict[tuple[str, str, str], float]:
    graph = edges.attribute(
        case.made.model, case.probe, metrics.answer_log_prob, method,
        ablation=kind, progress=False,
    )  # fmt: skip
    return {
        (edge.source, edge.target, edge.slot): abs(value) for edge, value in graph.scores.items()
    }


def _head_sums(method: str) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        graph = edges.attribute(
            case.made.model, case.probe, metrics.answer_log_prob, method,
            ablation="mean", progress=False,
        )  # fmt: skip
        return -graph.head_scores

    return answer


def _composed(mode: str, measure: Callable[..., Any]) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        values = measure(case.made.model, mode, fold_norm=False).values
        heads = case.made.model.shape.heads
        return {
            (a, b): float(values[a.layer, a.head, b.layer, b.head])
            for a in heads
            for b in heads
            if a.layer < b.layer
        }

    return answer


def _composed_by_edges(mode: str, method: str) -> Callable[[Case], Found]:
    slot = {"Q": "query", "K": "key", "V": "value"}[mode]

    def answer(case: Case) -> Found:
        found = _edge_sizes(case, method, "mean")
        heads = case.made.model.shape.heads
        return {
            (a, b): found[str(a), str(b), slot] for a in heads for b in heads if a.layer < b.layer
        }

    return answer


def _routed(name: str) -> Callable[[Case], Found]:
    def answer(case: Case) -> Found:
        # The constant that fixes the norms dwarfs head writes, so routes at the usual thresholds
        # contain no heads.
        least = 1e-3 if name == "on_route" else 1e-9
        found = flow.route_scores(
            case.made.model, case.probe, part_threshold=least, edge_threshold=least
        )
        return found[name].mean

    return answer


def _chance(case: Case) -> Found:
    """Method: random numbers, the chance baseline."""
    shape = case.made.model.shape
    return np.random.default_rng(len(case.name)).random((shape.n_layers, shape.n_heads))


def _in_context(case: Case) -> Found:
    found = edges.contextual(
        case.made.model, case.probe, metrics.answer_log_prob, ablation="mean", progress=False
    )
    return -found.scores.mean


def _facilitating(case: Case) -> Found:
    gates = edges.causal_gates(
        case.made.model, case.probe, metrics.answer_log_prob, steps=20, progress=False
    )
    return gates["facilitating"].mean


def _direct(case: Case) -> Found:
    values = lens.head_attribution(case.made.model, case.probe, "mean").mean
    return np.asarray(np.abs(values))


def _gated(case: Case) -> Found:
    gates = pruning.learn_gates(case.made.model, case.probe, metrics.loss, steps=60, progress=False)
    opened: np.ndarray = gates.scores.mean
    return opened


def _methods() -> Iterable[Method]:
    for asks, names in {
        "previous token": ("previous_token", "previous_token_no_sink",
                           "previous_token_value_weighted", "detect_head_previous_token"),
        "current token": ("current_token", "current_token_no_sink"),
        "duplicate token": ("duplicate_token", "duplicate_token_no_sink",
                            "duplicate_token_value_weighted", "detect_head_duplicate_token"),
        "induction": ("induction", "induction_no_sink", "induction_value_weighted",
                      "detect_head_induction"),
        "copies": ("copying",),
    }.items():  # fmt: skip
        for name in names:
            yield Method(name, asks, _scored(name))
    for name in ("retrieval", "retrieval_needle_only", "retrieval_copy_only", "needle_mass"):
        yield Method(name, "retrieval", _scored(name, "needle"))
    yield Method("ioi_s_inhibition", "S-inhibition", _scored("ioi_s_inhibition", "names"))
    yield Method("ioi_name_mover", "name mover", _scored("ioi_name_mover", "names"))
    for name in ("copying_top1", "copying_eigenvalues"):
        yield Method(name, "copies", _scored(name))
    for name in ("matching_top1", "matching_eigenvalues"):
        yield Method(name, "matches", _scored(name))
    for suffix, asks in (("", "used"), (", redundant heads", "redundant")):
        for name, answer in _USE.items():
            yield Method(name + suffix, asks, answer)
    for method in ("exact", "eap_ig", "eap"):
        for kind in ("mean", "zero", "patch"):
            yield Method(f"{method}, {kind}", "edges", _edges_by(method, kind))
    for method in ("eap_ig_activations", "relp", "gim"):
        yield Method(f"{method}, mean", "edges", _edges_by(method, "mean"))
    for mode in "QKV":
        asks = f"{mode}-composition"
        yield Method(f"composition {mode}", asks, _composed(mode, circuits.composition))
        yield Method(f"subspace affinity {mode}", asks, _composed(mode, circuits.subspace_affinity))
        for method in ("exact", "eap_ig"):
            yield Method(f"{method} edges {mode}", asks, _composed_by_edges(mode, method))


_USE: Mapping[str, Callable[[Case], Found]] = {
    **{f"ablation, {kind}": _ablated(kind) for kind in ("zero", "mean", "resample", "patch")},
    "ablation, uniform": _ablated("uniform"),
    "attribution": _estimated("mean", 1),
    "attribution, zero": _estimated("zero", 1),
    "integrated gradients": _estimated("mean", 8),
    "gradient importance": _important(
        lambda case: pruning.gradient_importance(case.made.model, case.probe, metrics.loss)
    ),
    "learned gates": _gated,
    "output norm": _important(lambda case: pruning.output_norm(case.made.model, case.probe)),
    "weight norm": _important(lambda case: pruning.weight_norm(case.made.model)),
    "confidence": _important(lambda case: pruning.confidence(case.made.model, case.probe)),
    "direct attribution": _direct,
    "edge sums, eap": _head_sums("eap"),
    "edge sums, eap_ig": _head_sums("eap_ig"),
    "edge sums, exact": _head_sums("exact"),
    "contextual decomposition": _in_context,
    "causal gates": _facilitating,
    "information flow": _routed("flow"),
    "on route": _routed("on_route"),
    "chance": _chance,
}

METHODS: Mapping[str, Method] = {method.name: method for method in _methods()}
