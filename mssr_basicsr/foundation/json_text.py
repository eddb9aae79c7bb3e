"""JSON for any reader, as the commands print it and training writes it."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(value: Any) -> str:
    """``value`` as indented JSON; a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
