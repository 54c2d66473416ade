"""Every study that ships, by name. Adding one: its claims in a file, and that file's list here."""

from collections.abc import Mapping
from types import MappingProxyType

from headscope.studies import attention, readings
from headscope.studies.study import Study

STUDIES: Mapping[str, Study] = MappingProxyType(
    {one.name: one for one in (*attention.ALL, *readings.ALL)}
)
