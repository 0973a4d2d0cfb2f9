"""The methods by the names that recipes give them. Each is a folder that declares itself; this is the only other line.

Settings are light; steps and objectives are imported when they are asked for.
"""

from __future__ import annotations

from typing import Any

from calm_ray.methods import calm, dco, gold
from calm_ray.methods.base import Method

METHODS: dict[str, Method[Any]] = {
    "calm": calm.CALM,
    "sft": calm.SFT,
    "dpo_gold": gold.DPO_GOLD,
    "sft_gold": gold.SFT_GOLD,
    "dco": dco.DCO,
}
