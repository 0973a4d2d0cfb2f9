"""A logits processor, loaded by real engines, that makes them crash or hang on certain prompts."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

NAME = "poison:Poison"


def poison_file() -> Path:
    """Lists the poisoned prompts: [{"start": token ids, "how": "crash" | "sleep" | "stop", "once": file or None}, ...].

    The file named by `once` is created when the poison acts; from then on it is harmless.
    """
    return Path(os.environ["CALM_RAY_CACHE"]) / "poison.json"


class Poison(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._poisons = json.loads(poison_file().read_text()) if poison_file().exists() else []

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            for poison in self._poisons:
                if list(prompt or [])[: len(poison["start"])] == poison["start"]:
                    self._act(poison)

    def _act(self, poison: dict[str, Any]) -> None:
        once = poison["once"]
        if once is not None:
            try:
                Path(once).touch(exist_ok=False)
            except FileExistsError:
                return
        if poison["how"] == "crash":
            os._exit(1)
        elif poison["how"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(3600)
