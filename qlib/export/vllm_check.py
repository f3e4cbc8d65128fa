"""What vLLM would refuse of an exported folder, told by its config.json and the headers of its weights.

Read from the sources of vLLM 0.33.0 for NVIDIA cards: quantization/auto_gptq.py (symmetric 4 and 8 bits alone; which
version of the format it is does not matter to these), quantization/compressed_tensors (integers of 2 to 8 bits with
zeros or without: Marlin runs 4 bits and symmetric 8, Humming, installed with vLLM, the rest), and what both ask
of linears that vLLM runs as one.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from qlib.models.checkpoint import TensorEntry, read_config, read_entries
from qlib.models.families import family_of

__all__ = ["problems", "parallel_sizes", "VERSION"]

VERSION = "0.33.0"
FLOATS = ("F16", "BF16", "F32")
GROUPS = (-1, 32, 64, 128)  # of GPTQ
#: What the entry of a group may say, by its format.
SCHEMES = {
    "pack-quantized": dict(type=["int"], num_bits=[2, 3, 4, 5, 6, 7, 8], strategy=["group", "channel"], inputs=[None]),
    "int-quantized": dict(
        type=["int"], num_bits=[8], strategy=["channel", "tensor"], symmetric=[True], inputs=["token", "tensor"]
    ),
    "float-quantized": dict(
        type=["float"], num_bits=[8], strategy=["channel", "tensor"], symmetric=[True], inputs=[None, "token", "tensor"]
    ),
    "nvfp4-pack-quantized": dict(
        type=["float"], num_bits=[4], strategy=["tensor_group"], group_size=[16], symmetric=[True], inputs=[None]
    ),
    "mxfp4-pack-quantized": dict(
        type=["float"], num_bits=[4], strategy=["group"], group_size=[32], symmetric=[True], inputs=[None]
    ),
}
WORDS = ("gptq", "pack-quantized")  # formats of 32-bit words


class Scheme(NamedTuple):
    """How a linear is stored: format, width of a code, input channels of a group (None: all), whether it has zeros."""

    format: str
    bits: int
    group: int | None
    zeros: bool


Plan = dict[str, tuple[tuple[int, int], Scheme | None]]


def problems(folder: str | Path) -> list[str]:
    """One line for everything that vLLM would refuse, or silently compute otherwise; empty if it loads the folder.

    Raises:
        UserError: the folder holds no readable checkpoint.
    """
    folder = Path(folder)
    config, entries = read_config(folder), read_entries(folder)
    if (written := config.get("quantization_config")) is None:
        return []
    method = written.get("quant_method")
    if method not in METHODS:
        return [f"quant_method: '{method}' is unknown to vLLM; allowed: {', '.join(METHODS)}"]
    plan, found = _plan(folder, config, entries)
    for name, (shape, scheme) in plan.items():
        expected = {"weight": (FLOATS, shape)} if scheme is None else _tensors(scheme, shape)
        for part, (types, wanted) in expected.items():
            entry = entries.get(f"{name}.{part}")
            if entry is None:
                found.append(f"{name}.{part}: is missing")
            elif entry.dtype not in types or tuple(entry.shape) != wanted:
                found.append(
                    f"{name}.{part}: is {entry.dtype} {list(entry.shape)}; expected {'/'.join(types)} {list(wanted)}"
                )
    return found + _fused(config, entries, plan) + _splits(config, plan, 1)


def parallel_sizes(folder: str | Path, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> dict[int, str]:
    """Numbers of cards that the linears can be split over: the first reason against each, empty if there is none."""
    folder = Path(folder)
    config = read_config(folder)
    plan, _ = _plan(folder, config, read_entries(folder))
    return {size: next(iter(_splits(config, plan, size)), "") for size in sizes}


def _plan(folder: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> tuple[Plan, list[str]]:
    """Shape and scheme of every linear in blocks, and what is wrong with the schemes."""
    from transformers import AutoConfig

    from qlib.models.families import blocks_of, linears_of
    from qlib.models.load import empty_model

    model = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    prefix, written = family_of(model.config).blocks, config.get("quantization_config") or {}
    scheme_of, found = METHODS.get(written.get("quant_method"), _plain)(written, entries)
    plan = {}
    for index, block in enumerate(blocks_of(model)):
        for name, linear in linears_of(model, block).items():
            path = f"{prefix}.{index}.{name}"
            plan[path] = tuple(linear.weight.shape), scheme_of(path)
    return plan, found


def _plain(written: dict[str, Any], entries: dict[str, TensorEntry]):
    return lambda name: None, []


def _gptq(written: dict[str, Any], entries: dict[str, TensorEntry]):
    bits, group, symmetric = written["bits"], written["group_size"], written["sym"]
    found = []
    if (bits, symmetric) not in ((4, True), (8, True)):
        kind = "symmetric" if symmetric else "asymmetric"
        known = "allowed: 4 or 8, symmetric (else: compressed_tensors)"
        found.append(f"bits: {bits} {kind} is not allowed in GPTQ; {known}")
    if group not in GROUPS:
        found.append(f"group_size: {group} is not allowed; allowed: {', '.join(map(str, GROUPS))}")
    if written["desc_act"] and group != -1:
        found.append("desc_act: true is not allowed; allowed: false")
    scheme = Scheme("gptq", bits, None if group == -1 else group, True)
    return lambda name: scheme if f"{name}.qweight" in entries else None, found


def _compressed(written: dict[str, Any], entries: dict[str, TensorEntry]):
    schemes, found = {}, []
    for label, group in written["config_groups"].items():
        weights, inputs = group["weights"], group.get("input_activations")
        format_ = group.get("format") or written["format"]
        asked = weights | {"inputs": inputs and inputs["strategy"]}
        if format_ not in SCHEMES:
            found.append(f"{label}: format: '{format_}' is not allowed; allowed: {', '.join(SCHEMES)}")
        for field, allowed in SCHEMES.get(format_, {}).items():
            if asked[field] not in allowed:
                found.append(f"{label}: {field}: {asked[field]} is not allowed in {format_}; allowed: {allowed}")
        scheme = Scheme(format_, weights["num_bits"], weights["group_size"], not weights["symmetric"])
        schemes |= {target: (scheme, weights["strategy"] == "tensor") for target in group["targets"]}

    def scheme_of(name: str) -> Scheme | None:
        if any(_matches(name, one) for one in written.get("ignore") or []):
            return None
        scheme, whole = next((one for target, one in schemes.items() if _matches(name, target)), (None, False))
        return scheme._replace(group=0) if whole else scheme  # 0: the tensor has one scale

    return scheme_of, found


METHODS = {"gptq": _gptq, "compressed-tensors": _compressed}


def _matches(name: str, target: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target in (name, "Linear")


def _tensors(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Types and shape of every tensor that stands for a weight `[out, in]`."""
    (out, width), (format_, bits, group, zeros) = shape, scheme
    groups = width // group if group else 1
    if format_ == "gptq":
        packed, points = (width * bits // 32, out), (groups, out * bits // 32)
        return {
            "qweight": (("I32",), packed), "qzeros": (("I32",), points), "scales": (FLOATS, (groups, out)),
            "g_idx": (("I32",), (width,)),
        }  # fmt: skip
    scale = (FLOATS, (1,) if group == 0 else (out, groups))
    if format_ in ("int-quantized", "float-quantized"):
        return {"weight": (("I8",) if format_ == "int-quantized" else ("F8_E4M3",), shape), "weight_scale": scale}
    if format_ == "nvfp4-pack-quantized":
        tensors = {"weight_scale": (("F8_E4M3",), (out, groups)), "weight_global_scale": (("F32",), (1,))}
        return tensors | {"weight_packed": (("U8",), (out, width // 2))}
    if format_ == "mxfp4-pack-quantized":
        return {"weight_packed": (("U8",), (out, width // 2)), "weight_scale": (("U8",), (out, groups))}
    tensors = {"weight_packed": (("I32",), (out, -(-width * bits // 32))), "weight_scale": scale}
    tensors["weight_shape"] = ("I64",), (2,)
    if zeros:
        tensors["weight_zero_point"] = ("I32",), (-(-out * bits // 32), groups)
    return tensors


def _fused(config: dict[str, Any], entries: dict[str, TensorEntry], plan: Plan) -> list[str]:
    """vLLM computes linears that read the same input as one: they must be of one format, with one global scale."""
    found = []
    family = family_of(type("Raw", (), config))
    for first in [name for name in plan if name.endswith(family.groups[0][0])]:
        block = first.removesuffix(family.groups[0][0])
        for group in family.groups:
            schemes = {plan[block + name][1] for name in group}
            together = f"{block}{group[0]}: with {', '.join(name.rpartition('.')[2] for name in group[1:])}"
            if len(schemes) > 1:
                named = sorted(f"{one.format} {one.bits} bits" if one else "no format" for one in schemes)
                found.append(f"{together}: must have one format, these have {' and '.join(named)}")
            elif len(group) > 1 and (one := schemes.pop()) and one.format == "nvfp4-pack-quantized":
                names = [f"{block}{name}.weight_global_scale" for name in group]
                if len({_number(entries[name], name) for name in names if name in entries}) > 1:
                    found.append(f"{together}: weight_global_scale differs, vLLM takes the largest for all")
    return found


def _number(entry: TensorEntry, name: str) -> float:
    with safe_open(entry.file, "pt") as file:
        return file.get_tensor(name).item()


def _splits(config: dict[str, Any], plan: Plan, size: int) -> list[str]:
    """Why linears cannot be split over `size` cards: by output, those that end a branch by input."""
    found = []
    heads, shared = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % size or (shared % size and size % shared):
        found.append(f"{heads} heads, {shared} of keys, cannot be split over {size} cards")
    for name, ((out, width), scheme) in plan.items():
        if scheme is None:
            continue
        if name.endswith(("o_proj", "down_proj")):
            width /= size
        else:
            out /= min(size, shared) if name.endswith(("k_proj", "v_proj")) else size
        asked = {"input channels": (width, 32 // _common(scheme.bits) if scheme.format in WORDS else 1)}
        asked["input channels of a group"] = (width, scheme.group or 1)
        asked["output channels"] = (out, 32 // _common(scheme.bits) if scheme.zeros else 1)
        for what, (count, unit) in asked.items():
            if count % unit:
                found.append(f"{name}: {count:g} {what} on each of {size} cards are no multiple of {unit}")
    return found


def _common(bits: int) -> int:
    """The greatest power of two that divides `bits`: 32 / it codes fill whole words of 32 bits."""
    return bits & -bits
