"""The adapters that a run may train, a row each: options, planning, training and conversion read it here. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AdapterKind:
    """title: for people. magnitudes: whether a number an output trains besides the two matrices. keywords: of peft's LoraConfig."""

    title: str
    magnitudes: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)


ADAPTERS = {
    "lora": AdapterKind("LoRA"),  # Hu et al. 2021
    "dora": AdapterKind("DoRA", magnitudes=True, keywords={"use_dora": True}),  # Liu et al. 2024
}


def kind_of(config: Mapping[str, Any]) -> AdapterKind:
    """The row that a configuration of peft's is of."""
    rows = list(ADAPTERS.values())
    return next((row for row in rows if row.keywords and all(config.get(key) == value for key, value in row.keywords.items())), rows[0])
