"""A page for every scorer: its docstring, what it declares, and the bundled model's heads."""

import inspect
from pathlib import Path

import headscope as hs
from docs.pages.write import heading, list_table, plain
from headscope.models.protocol import HeadModel, lacks
from headscope.scorers import CATALOGUE, DEFAULT, Scorer
from headscope.table import HeadTable

_FORMS = {
    "rows_no_sink": "without the first token",
    "rows_value_weighted": "weighted by what values write",
}
_PROBES = {
    "random_images": "images of random blots (:func:`headscope.probes.random_images`)",
    "repeated_tokens": "random tokens said twice (:func:`headscope.probes.repeated_tokens`)",
    "text": "bundled passages of text (:func:`headscope.probes.text`)",
    "ioi": "indirect-object pairs (:func:`headscope.probes.pairs`)",
    "needle": "facts hidden in long text (:func:`headscope.probes.needle`)",
}
_READS = {
    "row": "attention rows",
    "output": "head outputs",
    "qk": "QK scores, before the softmax",
    "gradient": "head outputs and the gradient of a metric by them",
}
_CONTROLS = {
    "flat": "uniform attention over the visible keys, on the same examples (paired)",
    "unrepeated": "the probe's control: on repeated tokens, the later copies permuted (paired)",
    "needle": "the probe's control: another needle in its place, or another question (paired)",
}


_NO_CONTROL = "none: compare heads, not probes"


def scorer_pages(pictures: Path | None) -> dict[str, str]:
    """Pages by path below ``generated/``; with pictures drawn into that folder."""
    model = hs.load()
    table = None if pictures is None else hs.score(model, scorers=applicable(model))
    families = _families()
    pages = {
        f"scorers/{base}.rst": _page(base, names, table, pictures, model.name)
        for base, names in families.items()
    }
    return pages | {"scorers/index.rst": _index(families), "scorers/weights.rst": _weights()}


def applicable(model: HeadModel) -> list[str]:
    """Names of the scorers that can be asked of a model, those of weights left out."""
    return [
        name
        for name, one in CATALOGUE.items()
        if one.kind != "weight" and not any(lacks(model, need) for need in one.needs)
    ]


def _families() -> dict[str, list[str]]:
    """Base name -> it and its other forms."""
    families: dict[str, list[str]] = {}
    for name, scorer in CATALOGUE.items():
        if scorer.kind == "weight":
            continue
        base = name.removesuffix(scorer.reads.removeprefix("rows"))
        families.setdefault(base, []).append(name)
    return families


def _tested(scorer: Scorer) -> str:
    """Which test the p-value comes from."""
    if scorer.control is None:
        return "none"
    side = "two-sided" if scorer.alternative == "two-sided" else "one-sided, above the null"
    return (
        f"Student's t of the differences, {side}; the sign test where these are tied "
        "(:doc:`/validity`)"
    )


def _range(scorer: Scorer) -> str:
    low, high = ("unbounded" if bound is None else f"{bound:g}" for bound in scorer.bounds)
    return f"{low} to {high}"


def _page(
    base: str, names: list[str], table: HeadTable | None, pictures: Path | None, model: str
) -> str:
    scorer = CATALOGUE[base]
    called = "never" if scorer.threshold is None else f"significant and above {scorer.threshold:g}"
    facts = [
        ["Unit", scorer.unit],
        ["Range", _range(scorer)],
        ["Reads", _READS[scorer.kind]],
        ["Probe it is meant for", _PROBES[scorer.probe.name] if scorer.probe else "none"],
        ["Null", _CONTROLS[scorer.control.name] if scorer.control else _NO_CONTROL],
        ["Test", _tested(scorer)],
        ["A head is called so when", called],
        ["Needs of the model", ", ".join(f"``{one}``" for one in scorer.needs) or "nothing"],
        ["In a plain scan", "yes" if base in DEFAULT else "no: ask for it by name"],
        ["Source", scorer.source],
    ]
    text = heading(base) + "\n" + (inspect.getdoc(scorer.function) or "") + "\n\n"
    text += list_table([], [[f"**{name}**", value] for name, value in facts], "25 75")
    text += (
        "\n.. code-block:: python\n\n"
        f'   table = hs.score(model, scorers="{base}")\n'
        f'   table.top("{base}", 5)\n\n'
    )
    forms = [(name, _FORMS[CATALOGUE[name].reads]) for name in names if name != base]
    if forms:
        text += "Other forms: " + "; ".join(f"``{name}`` ({how})" for name, how in forms) + ".\n\n"
    shown = table is not None and base in table and bool((table[base].n > 0).any())
    if table is not None and pictures is not None and shown:
        text += _measured(base, names, table, pictures, model)
    return text


def _measured(base: str, names: list[str], table: HeadTable, pictures: Path, model: str) -> str:
    pictures.mkdir(parents=True, exist_ok=True)
    hs.plots.save(hs.plots.heatmap(table[base]), pictures / f"{base}.png")
    rows = []
    for name in names:
        scores = table[name]
        for head, mean in scores.top(3):
            sem, p = scores.sem[head], scores.p_value
            chance = "" if p is None else f"{p[head]:.2g}"
            rows.append([f"``{name}``", str(head), f"{mean:.3f}", f"{sem:.3f}", chance])
    titles = ["score", "head", "mean", "standard error", "p-value"]
    return (
        heading(f"On the bundled model {model}", "-")
        + f"\n.. image:: ../pictures/{base}.png\n   :alt: {base} of every head of {model}, layer "
        "by head; the highest are in the table below\n   :width: 70%\n\n" + list_table(titles, rows)
    )


def _index(families: dict[str, list[str]]) -> str:
    rows = [
        [
            f":doc:`{base}`" + (" \\*" if base not in DEFAULT else ""),
            CATALOGUE[base].unit,
            _range(CATALOGUE[base]),
            CATALOGUE[base].description,
        ]
        for base in families
    ]
    toc = "\n".join(f"   {base}" for base in [*families, "weights"])
    return (
        heading("Scorers")
        + f"\nHeadscope ships {len(CATALOGUE)} scorers: those on :doc:`weights`, and "
        f"{len(families)} kinds of scorers of what heads do. Every score has a "
        "mean, a standard error, a unit, a range and, where it says so, a null. What the numbers "
        "can and cannot show: :doc:`/validity`. A scorer of your own: :doc:`/howto/your-scorer`.\n"
        "\n"
        + list_table(["scorer", "unit", "range", "what it measures"], rows)
        + "\n\\* not in a plain scan; ask for it by name. Scores read from the weights alone: "
        f":doc:`weights`.\n\n.. toctree::\n   :hidden:\n\n{toc}\n"
    )


def _weights() -> str:
    table = hs.circuits.score(hs.load())
    rows = []
    for name, scores in table.items():
        low, high = ("unbounded" if bound is None else f"{bound:g}" for bound in scores.bounds)
        facts = (plain(one) for one in (scores.unit, scores.description, scores.source))
        unit, meaning, source = facts
        rows.append([f"``{name}``", unit, f"{low} to {high}", meaning, source])
    return (
        heading("Scores of the weights")
        + "\nThese are read from the weights: nothing is run but tiny passes that measure norms. "
        '``hs.score(model, scorers=["ov_norm", "induction"])`` takes them by name, and '
        ":func:`headscope.circuits.score` gives all of them. They say what a head could do, "
        "not what it does on a text.\n\n"
        + list_table(["score", "unit", "range", "a high value means", "source"], rows)
    )
