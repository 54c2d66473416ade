"""The table of quirks as Markdown; ``docs/howto/your-model.md`` holds it, and a test compares."""

from headscope.models.quirks import QUIRKS


def quirk_table() -> str:
    """One row per quirk: what differs, for example where, what comes of it, what to use instead."""
    head = (
        "| what differs | for example | outcome | how | instead | `model.limits` |",
        "|---|---|---|---|---|---|",
    )
    rows = (
        f"| {one.name} | {', '.join(one.families)} | {one.answer} | {one.how} | {one.instead} "
        f"| {', '.join(f'`{key}`' for key in one.limits)} |"
        for one in QUIRKS
    )
    return "\n".join((*head, *rows))
