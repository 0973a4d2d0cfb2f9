"""Seeds are hashes of what they are used for, not counters, because any engine may do any work in any order."""

from __future__ import annotations

import hashlib
import random


def derive_seed(*parts: object) -> int:
    """Hashes `parts` to a 31-bit seed, identical on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def rng_of(*parts: object) -> random.Random:
    return random.Random(derive_seed(*parts))
