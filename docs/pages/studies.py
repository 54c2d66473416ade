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
        "```bash",
        f"headscope study run {study.name} MODEL --out runs/studies",
        "```",
        "",
    ]
    return "\n".join(lines)
