"""What Qwen's authors measured of Qwen-72B, to stand beside predictions for their hardware."""

import json
from pathlib import Path
from typing import Any

__all__ = ["published_72b"]

FILE = Path(__file__).with_name("published.json")


def published_72b() -> list[dict[str, Any]]:
    """One row for each format of Qwen-72B-Chat.

    Returns:
        format, gpus, memory_gib, tokens_per_second, mmlu, c_eval, gsm8k, humaneval, source, note.
    """
    (model,) = json.loads(FILE.read_text(encoding="utf-8"))["models"]
    about = {name: model[name] for name in ("model", "new_tokens", "source", "note")}
    return [{"format": format} | figures | about for format, figures in model["formats"].items()]
