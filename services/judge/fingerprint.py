"""One short name for everything that decides how the judge scores."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(
    *, model: str, chat: bool, max_prefix_characters: int, criteria: Mapping[str, Mapping[str, Any]]
) -> str:
    """16 hex digits of SHA-256 over model name, prompts' texts, criteria's settings and the user's source.

    The order in which criteria are named does not matter; ports, addresses and limits are not part of it. A model
    folder counts by its name: put other weights under another name.
    """
    parts = {"model": model, "chat": chat, "max_prefix_characters": max_prefix_characters, "criteria": criteria}
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
