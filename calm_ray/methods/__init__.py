"""Registry of methods by recipe name. Adding a method takes a folder and one line here.

Importing a method's settings is cheap; its steps and objectives are imported lazily.
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
    "dco_gold": gold.DCO_GOLD,
}
