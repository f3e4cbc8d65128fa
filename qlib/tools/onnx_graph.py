"""A Qwen2 model as an ONNX graph in the operators that ONNX Runtime keeps for language models.

Tensors go to one file beside the graph as they are made, so that no more than one linear lies in memory in fp32.
"""

from pathlib import Path
from typing import Any, Callable

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qlib.errors import UserError

__all__ = ["Pack", "build", "one_linear"]

DATA, SMALL = "data.bin", 1024  # tensors of fewer bytes stay in the graph
PAGE = 4096
OWN = "com.microsoft"
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid(OWN, 1)]
IR = 10

#: What turns the graph of one linear into that of the quantized one.
Pack = Callable[[onnx.ModelProto], onnx.ModelProto]


def one_linear(name: str, source: str, weight: torch.Tensor) -> onnx.ModelProto:
    """A graph of one MatMul of the value `source [batch, tokens, in]` with `weight [out, in]`."""
    rows, columns = weight.shape
    inputs = helper.make_tensor_value_info(source, TensorProto.FLOAT, ["batch", "tokens", columns])
    output = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, ["batch", "tokens", rows])
    node = helper.make_node("MatMul", [source, f"{name}.weight"], [output.name], name)
    graph = helper.make_graph([node], "linear", [inputs], [output])
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR)  # which copies, so that the weight comes last
    stored = model.graph.initializer.add(name=f"{name}.weight", dims=[columns, rows], data_type=TensorProto.FLOAT)
    stored.raw_data = weight.T.contiguous().float().numpy().tobytes()
    return model


class Graph:
    """Nodes and tensors of a model that is being written to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes, self.tensors, self.made = folder, [], [], set()
        self.data = (folder / DATA).open("wb")

    def add(self, kind: str, inputs: list[str], output: str | list[str], domain: str = "", **attributes: Any) -> str:
        """Append a node. Returns its first output."""
        outputs = [output] if isinstance(output, str) else output
        self._append(helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: torch.Tensor | np.ndarray) -> str:
        """Store a tensor."""
        self._store(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def take(self, part: onnx.ModelProto) -> None:
        """Append all of a graph; what linears with the same input have in common, the quantizers call by the same name."""
        for node in part.graph.node:
            if self.made.isdisjoint(node.output):
                self._append(_copy(node))
        for tensor in part.graph.initializer:
            self._store(tensor)

    def save(self, inputs: list, outputs: list) -> Path:
        """Write the graph. Returns its path."""
        self.data.close()
        graph = helper.make_graph(self.nodes, "model", inputs, outputs, self.tensors)
        path = self.folder / "model.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=OPSETS, ir_version=IR).SerializeToString())
        return path

    def _append(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        self.made |= set(node.output)

    def _store(self, tensor: onnx.TensorProto) -> None:
        """Keep a tensor, its bytes in the file."""
        if len(tensor.raw_data) < SMALL:
            self.tensors.append(_copy(tensor))
            return
        self.data.seek(-self.data.tell() % PAGE, 1)  # where a file can be mapped
        place = {"location": DATA, "offset": self.data.tell(), "length": len(tensor.raw_data)}
        self.data.write(tensor.raw_data)
        kept = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        kept.data_location = TensorProto.EXTERNAL
        kept.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
        self.tensors.append(kept)


def _copy(message: Any) -> Any:
    """A message of its own: one that is taken from a graph keeps all of the graph in memory."""
    own = type(message)()
    own.CopyFrom(message)
    return own


def build(model: nn.Module, folder: Path, pack: Pack | None = None) -> Path:
    """Write a Qwen2 model in fp32, its linears as `pack` makes them; embedding and head stay as they are.

    Inputs: `ids [batch, tokens]`, `start [1]` (of the positions whose logits are wanted), `last [batch]` and `total`
    (the last position and the number of positions, cached ones included), and the cache. Outputs: `logits`, and the cache.

    Raises:
        UserError: it is no Qwen2 model, or one with a window or scaled positions.
    """
    config = model.config
    rope = config.rope_parameters
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.model_type != "qwen2" or rope.get("rope_type", "default") != "default" or windowed:
        raise UserError("model: only Qwen2 without window and scaled positions is written as ONNX here")
    graph, tensors = Graph(folder), dict(model.state_dict())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tables = _rotation(rope["rope_theta"], width, config.max_position_embeddings)
    cos, sin = (graph.constant(name, table) for name, table in zip(("cos", "sin"), tables))

    def linear(name: str, source: str) -> str:
        part = one_linear(name, source, tensors[f"{name}.weight"])
        graph.take(pack(part) if pack else part)
        if (bias := tensors.get(f"{name}.bias")) is None:
            return f"{name}.out"
        return graph.add("Add", [f"{name}.out", graph.constant(f"{name}.bias", bias.float())], f"{name}.sum")

    def norm(name: str, state: str, update: str | None = None) -> tuple[str, str]:
        """The normed value, and the residual stream with the update of the last block part."""
        own = {"epsilon": config.rms_norm_eps}
        scale = graph.constant(f"{name}.weight", tensors[f"{name}.weight"].float())
        if update is None:
            return graph.add("SimplifiedLayerNormalization", [state, scale], name, axis=-1, **own), state
        outputs = [name, "", "", f"{name}.state"]
        return graph.add("SkipSimplifiedLayerNormalization", [state, update, scale], outputs, OWN, **own), outputs[3]

    embedding = graph.constant("embedding", tensors["model.embed_tokens.weight"].float())
    state, update = graph.add("Gather", [embedding, "ids"], "embedded"), None
    cache: tuple[list, list] = ([], [])
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        normed, state = norm(f"{name}.input_layernorm", state, update)
        qkv = [linear(f"{name}.self_attn.{one}_proj", normed) for one in "qkv"]
        past, present = ([f"{when}.{index}.{one}" for one in ("key", "value")] for when in ("past", "present"))
        shape = ["batch", config.num_key_value_heads, "room", width]
        for names, values in zip((past, present), cache):
            values += [helper.make_tensor_value_info(one, TensorProto.FLOAT, shape) for one in names]
        heads = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
        inputs = [*qkv, *past, "last", "total", cos, sin]
        mixed = graph.add("GroupQueryAttention", inputs, [f"{name}.mixed", *present], OWN, do_rotary=1, **heads)
        update = linear(f"{name}.self_attn.o_proj", mixed)
        normed, state = norm(f"{name}.post_attention_layernorm", state, update)
        gate, up = (linear(f"{name}.mlp.{one}_proj", normed) for one in ("gate", "up"))
        silu = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        update = linear(f"{name}.mlp.down_proj", graph.add("Mul", [silu, up], f"{name}.inner"))
    normed, _ = norm("model.norm", state, update)
    end, axis = graph.constant("end", np.array([2**62])), graph.constant("axis", np.array([1]))
    wanted = graph.add("Slice", [normed, "start", end, axis], "wanted")
    head = embedding
    if not config.tie_word_embeddings:
        head = graph.constant("head", tensors["lm_head.weight"].float())
    graph.add("FusedMatMul", [wanted, head], "logits", OWN, transB=1)  # no MatMul: quantizers shall leave it alone
    kinds = (("ids", "INT64", ["batch", "tokens"]), ("start", "INT64", [1]), ("last", "INT32", ["batch"]))
    inputs = [helper.make_tensor_value_info(n, getattr(TensorProto, kind), s) for n, kind, s in kinds]
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "wanted", config.vocab_size])
    return graph.save(inputs + cache[0], [logits] + cache[1])


def _rotation(theta: float, width: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[positions, width / 2]`, as transformers has them."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.arange(positions).float()[:, None] * frequencies
    return angles.cos(), angles.sin()
