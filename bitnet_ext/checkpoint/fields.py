"""Typed, bounded reads of keys from an untrusted configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_ext.errors import CheckpointError

__all__ = ["Fields"]

MAX_SIZE = 1 << 30  # any count or extent; tensor sizes are held to the file's besides
LEAST = 1e-30


class Fields:
    """Keys of one object; every error names the file, the key, the value found and wanted."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, wanted: str) -> CheckpointError:
        """An error for the value of ``key``."""
        found = repr(self.values.get(key))[:80]
        return CheckpointError(f"{self.where}: {key}: found {found}, wanted {wanted}")

    def size(self, key: str, default: int | None = None, *, high: int = MAX_SIZE) -> int:
        """A positive integer; ``default`` where the key is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= high:
            raise self.fail(key, f"an integer of 1 to {high}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = LEAST, high: float = 1e9
    ) -> float:
        """A number of ``low`` to ``high``, by default such as float32 holds well."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, (int, float)) and type(value) is not bool and low <= value <= high:
            return float(value)
        raise self.fail(key, f"a number of {low:g} to {high:g}")

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        """One of ``choices``."""
        value = self.text(key, default)
        if value not in choices:
            raise self.fail(key, "one of " + ", ".join(choices))
        return value

    def section(self, key: str) -> Fields | None:
        """A nested object, None where absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one integer, a list, or null; negative ones mean none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 1024 or not all(type(i) is int and abs(i) <= MAX_SIZE for i in ids):
            raise self.fail(key, "a token id or a list of them")
        return tuple(dict.fromkeys(i for i in ids if i >= 0))

    def token_id(self, key: str) -> int | None:
        """One token id or None."""
        ids = self.token_ids(key)
        return ids[0] if ids else None
