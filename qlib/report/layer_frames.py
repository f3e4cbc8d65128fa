"""Data frames of one strategy's layers, from the details of its record, and what each figure shows in words."""

from typing import Any

from qlib.report.numbers import number
from qlib.report.record_frames import data_frame

__all__ = [
    "layer_frame", "pruned_frame", "kept_frame", "stayed_frame", "sensitivity_frame", "allocation_frame", "layer_alt",
    "kept_alt", "sensitivity_alt", "allocation_alt",
]  # fmt: skip


def layer_frame(layers: list[dict], strategy: str = ""):
    """strategy, block, linear, error: from a record's ``details.layers``, a list of ``{name, error, ...}``."""
    rows = []
    for layer in layers:
        parts = str(layer.get("name", "")).split(".")
        block = next((int(part) for part in parts if part.isdigit()), None)
        error = number({"value": layer.get("error")})
        rows.append({"strategy": strategy, "block": block, "linear": parts[-1], "error": error})
    return data_frame(rows, ["strategy", "block", "linear", "error"]).dropna(subset=["error"]).reset_index(drop=True)


def pruned_frame(details: dict, strategy: str = ""):
    """strategy, block, linear, error: of the weights that were masked, or of the outputs of a narrowed model.

    Of a shortened model: 1 - cosine between what reached each block and what it made of it, and the errors at gaps.
    """
    if details.get("depth"):
        return _depth_frame(details["depth"], strategy)
    if not details.get("width"):
        return layer_frame(details.get("layers") or [], strategy)
    parts = {"o_proj": "attention_error", "o_proj before": "attention_error_plain"}
    parts |= {"down_proj": "ffn_error", "down_proj before": "ffn_error_plain"}
    rows = [
        {"strategy": strategy, "block": one["block"], "linear": linear, "error": one[key]}
        for linear, key in parts.items()
        for one in details["width"]
    ]
    return data_frame(rows, ["strategy", "block", "linear", "error"])


def _depth_frame(depth: dict, strategy: str):
    """Two measures share the column `error`; ``attrs["measure"]`` says which, for the axis of the figure."""
    rows = [{"block": block, "linear": "1 - cosine", "error": one} for block, one in enumerate(depth["influence"])]
    for one in depth["patches"]:
        kinds = {"gap": "error_plain", "gap, patched": "error"}
        rows += [{"block": one["block"], "linear": kind, "error": one[key]} for kind, key in kinds.items()]
    frame = data_frame([{"strategy": strategy, **row} for row in rows], ["strategy", "block", "linear", "error"])
    frame.attrs["measure"] = "1 - cosine of a block" + ("\nRelative error at a gap" if depth["patches"] else "")
    return frame


def kept_frame(panels: dict[str, Any]):
    """panel, row, column, kept: from matrices of true and false by title."""
    rows = [
        {"panel": panel, "row": row, "column": column, "kept": bool(kept)}
        for panel, matrix in panels.items()
        for row, line in enumerate(matrix)
        for column, kept in enumerate(line)
    ]
    return data_frame(rows, ["panel", "row", "column", "kept"])


def stayed_frame(subject: Any, size: int = 32):
    """The same of a pruned subject: the blocks of a shortened one, the heads of a narrowed one, or corners of two masks."""
    if depth := subject.details.get("depth"):
        return kept_frame({"Blocks": [[block not in depth["gone"] for block in range(len(depth["influence"]))]]})
    width = subject.details.get("width")
    if width:
        count = round(len(width[0]["heads"]) / subject.details["kept"]["heads"])
        return kept_frame({"Attention heads": [[head in one["heads"] for head in range(count)] for one in width]})
    names = [layer["name"] for layer in subject.details["layers"]]
    picked = {names[0].rpartition(".")[2]: names[0], names[-1].rpartition(".")[2]: names[-1]}
    weights = {title: subject.model.get_submodule(name).weight for title, name in picked.items()}
    return kept_frame({title: (weight[:size, :size] != 0).tolist() for title, weight in weights.items()})


def sensitivity_frame(sensitivity: list[dict], bits: int | None = None):
    """block, linear, bits, kl: from a record's ``details.sensitivity``; default: of the least width alone."""
    rows = [{**_place(one["name"]), "bits": one["bits"], "kl": one["kl"]} for one in sensitivity]
    frame = data_frame(rows, ["block", "linear", "bits", "kl"])
    return frame[frame["bits"] == (frame["bits"].min() if bits is None else bits)].reset_index(drop=True)


def allocation_frame(allocation: dict[str, int]):
    """block, linear, bits: from a record's ``details.allocation``."""
    rows = [{**_place(name), "bits": bits} for name, bits in allocation.items()]
    return data_frame(rows, ["block", "linear", "bits"])


def _place(name: str) -> dict[str, Any]:
    """Block and kind of a linear, from its path."""
    parts = name.split(".")
    return {"block": next((int(part) for part in parts if part.isdigit()), None), "linear": parts[-1]}


def layer_alt(frame) -> str:
    """The finding of the layer errors in words."""
    if frame.empty:
        return "No layer errors were recorded."
    if "measure" in frame.attrs:  # what is no error of a linear, or several measures, which cannot be compared
        return f"{'; '.join(_span(name, own) for name, own in frame.groupby('linear', sort=False))}."
    worst, best = frame.loc[frame["error"].idxmax()], frame.loc[frame["error"].idxmin()]
    means = frame.groupby("linear", sort=False)["error"].mean()
    return (
        f"The error is largest in {worst['linear']} of block {worst['block']} with {worst['error']:.3g} and smallest "
        f"in {best['linear']} of block {best['block']} with {best['error']:.3g}; "
        f"on average {means.idxmax()} suffers most."
    )


def _span(name: str, own) -> str:
    least, most = own.loc[own["error"].idxmin()], own.loc[own["error"].idxmax()]
    ends = [f"{one['error']:.3g} at block {one['block']}" for one in (least, most)]
    return f"{name} is {ends[0]}" if len(own) == 1 else f"{name} is least with {ends[0]} and largest with {ends[1]}"


def kept_alt(frame) -> str:
    """The finding of a picture of masks in words."""
    if frame.empty:
        return "Nothing was pruned."
    by_row = frame.groupby(["panel", "row"], sort=False)["kept"].mean().mul(100).groupby(level=0, sort=False)
    shown = [
        f"{panel}: {rows.mean():.3g} % of the cells stayed, {rows.min():.3g} to {rows.max():.3g} % in a row"
        for panel, rows in by_row
    ]
    return "; ".join(shown) + "."


def sensitivity_alt(frame) -> str:
    """The finding of the sensitivities in words."""
    if frame.empty:
        return "No sensitivity was measured."
    worst, best = frame.loc[frame["kl"].idxmax()], frame.loc[frame["kl"].idxmin()]
    means = frame.groupby("linear", sort=False)["kl"].mean()
    return (
        f"At {worst['bits']} bits rounding {worst['linear']} of block {worst['block']} alone moves the model most, by "
        f"{worst['kl']:.2g} nats per token, {best['linear']} of block {best['block']} least, by {best['kl']:.2g}; on "
        f"average {means.idxmax()} matters most."
    )


def allocation_alt(frame) -> str:
    """The finding of an allocation of bits in words."""
    if frame.empty:
        return "Nothing was allocated."
    counts = frame["bits"].value_counts().sort_index()
    most = frame[frame["bits"] == frame["bits"].max()]["linear"].value_counts()
    shares = ", ".join(f"{count} linears get {bits} bits" for bits, count in counts.items())
    return f"{shares}; the greatest width goes most often to {most.idxmax()}, in {most.max()} blocks."
