"""A graph of `qlib.tools.onnx_graph` run by ONNX Runtime on the CPU, with as many threads as torch has."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

__all__ = ["OnnxRuntime", "feeds"]

ROOM = 128  # tokens by which the cache may grow before it moves


def feeds(config: Any, ids: torch.Tensor, keep: int) -> dict[str, np.ndarray]:
    """Inputs for `ids [rows, tokens]` with nothing cached."""
    (rows, tokens), empty = ids.shape, np.zeros(_cache_shape(config, len(ids), 0), np.float32)
    own = {"ids": ids.numpy(), "start": np.array([-keep]), "total": np.array(tokens, np.int32)}
    own["last"] = np.full(rows, tokens - 1, np.int32)
    return own | {f"past.{i}.{one}": empty for i in range(config.num_hidden_layers) for one in ("key", "value")}


def _cache_shape(config: Any, rows: int, room: int) -> tuple[int, int, int, int]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return rows, config.num_key_value_heads, room, width


class OnnxRuntime:
    """See `qlib.tools.runtime.Runtime`. Keys and values are written in place, as its documentation recommends."""

    def __init__(self, path: Path, config: Any) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.config, self.cached, self.room, self.cache = config, 0, 0, {}

    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        # Row by row: where activations are rounded, one scale serves all of a call, and rows shall not depend on others.
        rows = [self.session.run(["logits"], feeds(self.config, row[None], keep))[0] for row in ids]
        return torch.from_numpy(np.concatenate(rows))

    def prefill(self, ids: torch.Tensor) -> None:
        self.cached = 0
        self._run(ids)

    def decode(self, ids: torch.Tensor) -> None:
        self._run(ids)

    def _run(self, ids: torch.Tensor) -> None:
        """Compute `ids [tokens]` behind what is cached."""
        total = self.cached + len(ids)
        self._make_room(total)
        binding = self.session.io_binding()
        own = {"ids": ids[None].numpy(), "start": np.array([-1])}
        own |= {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
        for name, value in own.items():
            binding.bind_cpu_input(name, value)
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.cached = total

    def _make_room(self, tokens: int) -> None:
        if tokens <= self.room:
            return
        self.room = tokens + ROOM
        for name in (f"{i}.{one}" for i in range(self.config.num_hidden_layers) for one in ("key", "value")):
            wider = np.zeros(_cache_shape(self.config, 1, self.room), np.float32)
            if self.cached:
                wider[:, :, : self.cached] = self.cache[name].numpy()[:, :, : self.cached]
            self.cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(wider)
