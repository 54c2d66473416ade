"""An order of heads that takes long to find, kept on the disk head by head."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headscope.errors import HeadscopeError, InputError
from headscope.files import check_same, whole_file, writable_folder
from headscope.heads import HeadIndex


class KeptOrder:
    """The heads that are gone so far, and what they were chosen by.

    Args:
        file: JSON, replaced whole after every head.
        facts: JSON values that decide the order: a file of others is refused.
    """

    def __init__(self, file: Path, facts: Mapping[str, Any]) -> None:
        """Write nothing yet."""
        writable_folder(file.parent)
        self._file, self._facts = file, json.loads(json.dumps(facts))

    def read(self) -> tuple[HeadIndex, ...]:
        """Heads of an earlier run; none if there is no file.

        Raises:
            InputError: if the file is another order's, or none at all.
        """
        if not self._file.exists():
            return ()
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            facts, heads = dict(found["facts"]), tuple(map(HeadIndex.parse, found["heads"]))
        except (OSError, KeyError, TypeError, ValueError, HeadscopeError) as error:
            raise InputError(
                f"{self._file} is no kept order: give another name, or delete it."
            ) from error
        check_same(self._file, facts, self._facts, "order")
        return heads

    def write(self, heads: tuple[HeadIndex, ...]) -> None:
        """Keep the heads so far."""
        text = json.dumps({"facts": self._facts, "heads": [str(head) for head in heads]})
        with whole_file(self._file) as file:
            file.write(text.encode() + b"\n")
