"""Why a kernel is below 60 % of its limit. Every entry was found by measuring; none is a guess."""

from __future__ import annotations

# Name -> the reason, as the table's legend prints it.
REASONS: dict[str, str] = {}

# (case, direction) -> names of reasons, the weightiest first.
NOTES: dict[tuple[str, str], tuple[str, ...]] = {}
