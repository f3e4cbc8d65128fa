"""A Hugging Face model as a graph of OpenVINO whose KV cache is its state, and the weights that a graph stores."""

import sys
from typing import Any

import numpy as np
import torch
from torch import nn

sys.modules["openvino_telemetry"] = None  # it would send usage data and write an identity to the home folder

__all__ = ["convert", "linears", "stored"]

MODULE = "__module.network."  # what the front end calls the modules of `_Step`
EXAMPLE = 3  # tokens to trace with, behind 2 that are cached: no number that the trace could take for a constant


class _Past:
    """As much of a cache as the attention of a block asks for."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.pairs = list(zip(tensors[::2], tensors[1::2]))

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple:
        self.pairs[layer] = tuple(torch.cat(both, 2) for both in zip(self.pairs[layer], (keys, values)))
        return self.pairs[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.pairs[layer][0].shape[2]


class _Step(nn.Module):
    """Tokens behind a cache: logits of chosen places, and the cache with the tokens in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: torch.Tensor, places: torch.Tensor, beams: torch.Tensor, *past: torch.Tensor) -> tuple:
        """ids `[rows, tokens]`, places `[logits]`, beams `[rows]`, past: keys and values
        `[rows, heads, cached, width]`.

        The kernel that keeps the cache where it is needs `beams`, which choose the cache of each row, to be there.
        """
        cache = _Past(tuple(one.index_select(0, beams) for one in past))
        start, end = past[0].shape[2], past[0].shape[2] + ids.shape[1]
        at = torch.arange(start, end)  # [tokens]
        mask = torch.where(torch.arange(end)[None] <= at[:, None], 0.0, torch.finfo(torch.float32).min)
        mask = mask.expand(beams.shape[0], 1, -1, -1)  # the bf16 kernel takes one mask for all rows for another's
        body = self.network.model(
            input_ids=ids, attention_mask=mask, position_ids=at[None], past_key_values=cache, use_cache=True
        )
        logits = self.network.lm_head(body.last_hidden_state.index_select(1, places))
        return logits, *(one for pair in cache.pairs for one in pair)


def convert(network: nn.Module) -> Any:
    """The graph of a model; inputs as `_Step.forward` has them, but for the past. Changes `network`, whose weights it
    shares: 16-bit weights stay constants of 16 bits, behind which the graph computes in fp32."""
    import openvino as ov
    import openvino.opset13 as operations
    from openvino._offline_transformations import apply_make_stateful_transformation
    from openvino.frontend.pytorch import patch_model

    config = network.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, count = config.num_key_value_heads, 2 * config.num_hidden_layers
    past = [torch.zeros(1, heads, 2, width) for _ in range(count)]
    example = (torch.ones(1, EXAMPLE, dtype=torch.long), torch.arange(2), torch.zeros(1, dtype=torch.int32), *past)
    getattr(patch_model, "__make_16bit_traceable")(network)
    with torch.no_grad():
        graph = ov.convert_model(_Step(network), example_input=example)
    graph.inputs[0].get_node().set_partial_shape(ov.PartialShape([-1, -1]))
    names = {}
    for index in range(count):
        graph.inputs[3 + index].get_tensor().set_names({f"past.{index}"})
        graph.inputs[3 + index].get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, width]))
        graph.outputs[1 + index].get_tensor().set_names({f"present.{index}"})
        names[f"past.{index}"] = f"present.{index}"
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, names)
    rows = operations.gather(operations.shape_of(graph.input(0)), operations.constant([0]), operations.constant(0))
    shape = operations.concat([rows, operations.constant(np.array([heads, 0, width]))], 0)
    empty = operations.broadcast(operations.constant(np.float32(0)), shape)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty.output(0)])
    graph.validate_nodes_and_infer_types()
    return graph


def linears(graph: Any, outside: bool = False) -> dict[str, Any]:
    """Name of each linear of the blocks -> its node; `outside`: what else has weights: embedding, head, rotations."""
    weighted = [node for node in graph.get_ops() if node.get_type_name() in ("MatMul", "Gather")]
    named = {node.get_friendly_name(): node for node in weighted}
    if outside:
        return {name: node for name, node in named.items() if not name.startswith(f"{MODULE}model.layers.")}
    blocks = {name.removeprefix(MODULE).split("/")[0]: node for name, node in named.items() if MODULE in name}
    return {name: node for name, node in blocks.items() if name.startswith("model.layers.") and name.endswith("_proj")}


def stored(graph: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Name of each linear -> its fp32 values `[out, in]`, and the bytes of all their codes, scales and zeros."""
    weights, total = {}, 0
    for name, node in linears(graph).items():
        values, size = _value(node.input_value(1).get_node())
        weights[name], total = torch.from_numpy(np.ascontiguousarray(values)), total + size
    return weights, total


def _value(node: Any) -> tuple[np.ndarray, int]:
    """Decompress as the CPU's kernels do: in fp32 from codes on, although the graph says fp16; and the bytes of it."""
    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_data(dtype=np.float32), node.get_byte_size()
    values, size = _value(node.input_value(0).get_node())
    if kind == "Reshape":
        return values.reshape(list(node.get_output_shape(0))), size
    if kind == "Convert":
        return values, size
    second, more = _value(node.input_value(1).get_node())
    return {"Subtract": np.subtract, "Multiply": np.multiply}[kind](values, second), size + more
