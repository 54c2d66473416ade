"""A page for every study: its paper, its claims, what is measured for each, and how to run it."""

from headscope.studies import STUDIES, Study


def study_pages() -> dict[str, str]:
    """Pages by path below ``generated/``, and their index."""
    pages = {f"studies/{name}.md": _page(study) for name, study in STUDIES.items()}
    return pages | {"studies/index.md": _index()}


def _index() -> str:
    rows = [
        f"| [{name}]({name}.md) | {study.title} | {len(study.claims)} |"
        for name, study in STUDIES.items()
    ]
    names = "\n".join(STUDIES)
    return "\n".join(
        [
            "# All studies",
            "",
            f"The {len(STUDIES)} studies that ship, and how many claims each asks.",
            "",
            "| study | about | claims |",
            "|---|---|---|",
            *rows,
            "",
            f"```{{toctree}}\n:hidden:\n\n{names}\n```",
            "",
        ]
    )


def _page(study: Study) -> str:
    lines = [f"# {study.title} (`{study.name}`)", "", f"{study.paper}.", ""]
    for claim in study.claims:
        unit = f" ({claim.unit})" if claim.unit else ""
        lines += [
            f"## {claim.name}",
            "",
            claim.statement,
            "",
            f"- number: {claim.value}{unit}",
            f"- control: {claim.control}",
            "- holds where the 99 % interval of the difference lies above "
            f"{claim.least:g}{unit and ' ' + claim.unit}",
            "",
        ]
    lines += [
        "## How it is measured",
        "",
        study.about,
        "",
        *_how_to_run(study),
    ]
    return "\n".join(lines)


def _how_to_run(study: Study) -> list[str]:
    """The command; in words where a command cannot load what the study is asked of."""
    if study.of == "diffusion":
        return ["Asked of what `hs.diffusion.load` returns, in Python: `hs.studies.run`.", ""]
    asked = ["Asked of what `hs.vision.clip` returns.", ""] if study.of == "clip" else []
    return [
        *asked,
        "```bash",
        f"headscope study run {study.name} MODEL --out runs/studies",
        "```",
        "",
    ]
