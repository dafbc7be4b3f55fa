"""What the results of circuit tools have in common: JSON of a dataclass, with NaN as null."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd


def json_of(result: Any) -> str:
    """A result dataclass as one JSON object: a field each, arrays as nested lists, NaN and None as null."""
    return json.dumps(plain(result), allow_nan=False)


def plain(value: Any) -> Any:
    """A value as what `json` can write."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, pd.DataFrame):
        return {str(name): plain(value[name].to_numpy()) for name in value}
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            filled = value.astype(object)
            filled[~np.isfinite(value)] = None
            return filled.tolist()
        return value.tolist() if value.dtype.kind != "O" else [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
