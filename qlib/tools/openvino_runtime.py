"""A graph of OpenVINO, compiled for this CPU."""

from typing import Any

import numpy as np
import torch

__all__ = ["EXACT", "OpenVinoRuntime"]

#: Nothing is rounded. By default it computes in bf16 where the CPU can, keeps the cache in 8 bits, and rounds what is
#: multiplied with compressed weights to 8 bits.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenVinoRuntime:
    """See `qlib.tools.runtime.Runtime`; a graph of `qlib.tools.openvino_graph`."""

    def __init__(self, graph: Any, settings: dict[str, str]) -> None:
        import openvino as ov

        told = settings | {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
        self.compiled = ov.Core().compile_model(graph, "CPU", told)
        self.request = self.compiled.create_infer_request()

    @property
    def settings(self) -> dict[str, str]:
        """What it computes in, as it says itself."""
        return {name: str(self.compiled.get_property(name)) for name in (*EXACT, "INFERENCE_NUM_THREADS")}

    def _infer(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits `[rows, keep, vocabulary]` of the last of `ids [rows, tokens]` behind what is cached."""
        rows, tokens = ids.shape
        places, beams = np.arange(tokens - keep, tokens), np.arange(rows, dtype=np.int32)
        found = self.request.infer([ids.to(torch.int64).numpy(), places, beams], share_inputs=True)
        return torch.from_numpy(found[0])

    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        self.request.reset_state()
        return self._infer(ids, keep)

    def prefill(self, ids: torch.Tensor) -> None:
        self.request.reset_state()
        self._infer(ids[None], 1)

    def decode(self, ids: torch.Tensor) -> None:
        self._infer(ids[None], 1)
