"""Latency at true shapes: all formats of one layer interleaved in one process, then the head, then arithmetic."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate import parts
from qlib.evaluate.batches import linear_calls, time_batches
from qlib.evaluate.fastest import PlainLinear, compare_forms, fastest_form
from qlib.evaluate.footprint import grid_of, narrowed_shape
from qlib.evaluate.roofline import ReadProbe, copies_needed, last_level_cache
from qlib.evaluate.timing import exclusive, load_average, median_interval, time_rounds
from qlib.evaluate.whole_model import BASELINE, NEW_TOKENS, PHASES, Rounds, model_figures, model_floor
from qlib.models.shapes import Shape, find_shape

__all__ = ["time_formats"]

PROBE = "read bandwidth"
READING = "sum of a buffer larger than the cache, in the decode rounds"


def time_formats(
    model: str,
    formats: list[str],
    prompt_tokens: int = 256,
    context_tokens: int = 256,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 10,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time prefill and decode of number formats on the true shape of a model, against its fastest bf16 form.

    Args:
        model: a name that `qlib.models.shapes` knows.
        formats: such as ``int8`` and ``int4-g128``; ``bf16`` is always there.
        prompt_tokens: rows of a prefill. context_tokens: cached tokens before the one that is decoded.
        new_tokens: decode steps of a request.
        rounds: interleaved rounds behind each figure.

    Returns:
        formats: format -> measurements of the whole model (layers x layer + head).
        layer, head: the rounds behind them in ms, warm-up, copies, and kernels by linear.
        batches: see `time_batches`.
        baseline: which bf16 forms were compared, in which time, and which was chosen.
        floor: format -> least time of a decode step at the bandwidth measured in the same rounds, and the speed-up
            over a bf16 kernel that would run at its own floor.
        bandwidth: gigabytes per second. conditions: one line.

    Raises:
        UserError: an unknown model or format, or a count that is not positive.
    """
    for name, count in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("rounds", rounds)):
        if count < 1:
            raise UserError(f"{name}: {count} is not allowed; allowed: an integer of at least 1")
    shape, where = find_shape(model), torch.device(device)
    formats = list(dict.fromkeys([BASELINE, *formats]))
    for format in formats:
        if grid := grid_of(format):
            [grid.groups(columns) for _, columns in narrowed_shape(shape, format).linears.values()]
    load, tokens = load_average(), {"decode": (1, context_tokens), "prefill": (prompt_tokens, 0)}
    with exclusive(), torch.inference_mode():
        layer = _time_layer(shape, formats, tokens, rounds, seed, where)
        head = _time_head(shape, rounds, seed, where)
    conditions = (
        f"{shape.name}, {shape.layers} x one layer + head, random weights; {_device_words(where)}; bf16 activations, "
        f"batch 1, prompt {prompt_tokens}, context {context_tokens}, new tokens {new_tokens}; "
        f"load average before {load:.1f}"
    )
    counted = Rounds(
        {phase: layer[phase]["timed"].rounds for phase in PHASES},
        head["timed"].rounds["head"],
        layer["bandwidth"],
        head["bandwidth"],
        layer["packing_seconds"],
    )
    value, low, high = median_interval(layer["bandwidth"], seed)
    return {
        "formats": {
            format: model_figures(shape, counted, format, context_tokens, new_tokens, conditions, seed)
            for format in formats
        },
        "layer": _plain({name: part for name, part in layer.items() if name != "batches"}),
        "batches": layer["batches"],
        "head": _plain(head),
        "baseline": layer["baseline"],
        "floor": {format: model_floor(shape, counted, format, context_tokens) for format in formats},
        "bandwidth": {"value": value, "low": low, "high": high, "n": rounds, "unit": "GB/s", "method": READING},
        "conditions": conditions,
    }


def _time_layer(
    shape: Shape, formats: list[str], tokens: dict[str, tuple[int, int]], rounds: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Rounds of one layer in every format and phase, and the bandwidth read in the decode rounds.

    Args:
        tokens: phase -> new tokens and tokens cached before them.
    """
    generator = torch.Generator().manual_seed(seed)
    forms, compared = _choose_forms(shape, {phase: new for phase, (new, _) in tokens.items()}, device, generator)
    result: dict[str, Any] = {"baseline": compared, "packing_seconds": {}}
    layers: dict[str, list[nn.Module]] = {}
    for phase in PHASES:
        if forms["decode"] is not forms["prefill"]:
            layers = {format: built for format, built in layers.items() if grid_of(format)}
        for format in formats:
            if format not in layers:
                built, seconds = parts.build_layer(shape, format, forms[phase], device, generator)
                layers[format] = [built]
                if grid_of(format):
                    result["packing_seconds"][format] = seconds
        new, context = tokens[phase]
        sizes = [parts.layer_bytes(shape, format, context + new) for format in formats]
        copies = copies_needed(sizes, last_level_cache(device))
        calls = {}
        for format in formats:
            parts.add_copies(layers[format], copies)
            own = narrowed_shape(shape, format)
            works = [parts.Workload(own, new, context, device, generator) for _ in range(copies)]
            calls[format] = [partial(work.run, layer) for work, layer in zip(works, layers[format])]
            if own is shape:  # a mix of formats is summed up linear by linear
                calls |= linear_calls(shape, format, layers[format], new, device, generator)
        if phase == "decode":
            probe = ReadProbe(device)
            calls[PROBE] = [probe]
        timed = time_rounds(calls, rounds, device)
        kernels = {format: parts.kernels(layers[format][0], shape, new) for format in formats}
        result[phase] = {"timed": timed, "copies": copies, "kernels": kernels}
        if phase == "decode":
            result["bandwidth"] = probe.gigabytes_per_second(timed.rounds[PROBE])
            timed = probe = calls = works = None  # or there would be no room for what comes
            whole = {format: layers[format] for format in formats if narrowed_shape(shape, format) is shape}
            result["batches"] = time_batches(shape, whole, device, generator)
        built = calls = works = None  # or the next phase needs memory for both
    return result


def _choose_forms(
    shape: Shape, rows: dict[str, int], device: torch.device, generator: torch.Generator
) -> tuple[dict[str, type[nn.Module]], dict[str, Any]]:
    """The fastest form of a bf16 linear for each phase, and what was compared."""
    sample = parts.random_tensor(shape.linears["mlp.gate_proj"], device, generator)
    found = dict(zip(rows, compare_forms(sample, list(rows.values()))))
    compared = {phase: {"chosen": form.name, "milliseconds": times} for phase, (form, times) in found.items()}
    return {phase: form for phase, (form, _) in found.items()}, compared


def _time_head(shape: Shape, rounds: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Rounds of final norm and head for one row. A head that shares the embedding's weight stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    form, compared = PlainLinear, {}
    if not shape.tied:
        sample = parts.random_tensor((min(shape.vocab, 2**13), shape.hidden), device, generator)
        form, compared = fastest_form(sample, rows=1)
        del sample
    x = parts.random_tensor((1, 1, shape.hidden), device, generator, scale=1.0)
    copies = copies_needed([parts.head_bytes(shape)], last_level_cache(device))
    heads = [parts.build_head(shape, form, device, generator) for _ in range(copies)]
    probe = ReadProbe(device)
    calls = {"head": [partial(head, x) for head in heads], PROBE: [probe]}
    timed = time_rounds(calls, rounds, device)
    return {
        "timed": timed,
        "copies": copies,
        "bandwidth": probe.gigabytes_per_second(timed.rounds[PROBE]),
        "kernel": form.name,
        "compared": compared,
    }


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """A part's raw figures as JSON can hold them."""
    plain = {}
    for name, value in part.items():
        if isinstance(value, dict):
            plain[name] = _plain(value)
        elif name == "timed":
            rounds = {key: [round(float(one), 5) for one in values] for key, values in value.rounds.items()}
            plain |= {"milliseconds": rounds, "warm_up_rounds": value.warm_up, "settled": value.settled}
        else:
            plain[name] = [round(float(one), 3) for one in value] if isinstance(value, np.ndarray) else value
    return plain
