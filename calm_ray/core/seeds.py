"""Seeds are hashes of what they are for, never running numbers: work may fall on any engine in any order."""

from __future__ import annotations

import hashlib
import random


def derive_seed(*parts: object) -> int:
    """A 31-bit seed for the thing that `parts` name, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def rng_of(*parts: object) -> random.Random:
    return random.Random(derive_seed(*parts))
