"""Every tool in its own runtime on one true layer of Qwen-72B: decode and prefill, beside ours at as many bits.

The layer's weights are random. A tool is given a model of one layer and 32 tokens, and the same with a layer as narrow as can
be, which tells what a call costs beside the layer: that is taken off, in its favour.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qlib.bench.guests import Guest, tool
from qlib.bench.rows import Row, judge, missing, time_ratio
from qlib.bench.subjects import write_random_checkpoint
from qlib.errors import UserError
from qlib.evaluate import parts
from qlib.evaluate.fastest import fastest_form
from qlib.evaluate.timing import exclusive, median_interval, time_rounds
from qlib.models.shapes import Shape, find_shape
from qlib.params import load_strategies
from qlib.progress import clock
from qlib.quantize.tool import Options
from qlib.tools.about import ANY, about

__all__ = ["measure", "settings_of"]

CONTEXT = PROMPT = 256
VOCAB = 32
SECONDS = {"decode": 5.0, "prefill": 8.0}  # that the counted rounds of a setting may take about
ROUNDS = (3, 7)
SLOW = 1.0  # seconds of a first round from which on there is no other warming up
WIDTHS = (4, 8, 3, 2)  # in the order in which they are timed, where time is short
#: Says that `measure` asks whether it is the turn of strategies, and names those it left out.
LIMITED = True
CPU = torch.device("cpu")
ROWS = {"decode": 1, "prefill": PROMPT}


def measure(root: Path, turn: Callable[[Sequence[str]], bool]) -> tuple[list[Row], list[str]]:
    """Two rows for each setting of a tool, and the strategies that were left out.

    Settings that run in the same format are timed once.
    """
    rows, late, begun = [], [], time.perf_counter()
    wide = replace(find_shape("qwen-72b"), vocab=VOCAB, tied=True)
    narrow = replace(wide, heads=1, kv_heads=1, ffn=256)
    with tempfile.TemporaryDirectory() as folder, exclusive():
        models = {name: Path(folder) / name for name in ("layer", "rest")}
        for name, shape in (("layer", wide), ("rest", narrow)):
            write_random_checkpoint(models[name], shape, 1, VOCAB)
        for ours, group in groupby(settings_of(root), key=lambda setting: our_format(setting[0])):
            layers: dict[str, dict[str, nn.Module]] = {}
            for options, names in group:
                if not turn(names):
                    late += names
                    continue
                print(f"  {names[0]}, after {clock(time.perf_counter() - begun)}", flush=True)
                layers = layers or {phase: _layers(wide, ours, phase) for phase in ROWS}
                rows += _rows(options, names, ours, layers, models, wide)
    return rows, late


def settings_of(root: Path, by: str = "runtime") -> list[tuple[Options, list[str]]]:
    """Options that differ in what runs ("runtime") or in how codes are chosen ("method"), by width as in
    `WIDTHS`; and the strategies of tools that have them."""
    found: dict[tuple, tuple[Options, list[str]]] = {}
    for strategy in load_strategies(sorted((root / "params").glob("tool-*.yaml")), root):
        options = Options(**{name: value for name, value in strategy.recipe[0].items() if name != "pass"})
        key = _runs_as(options) if by == "runtime" else (options.name, options.bits, options.method)
        found.setdefault(key, (options, []))[1].append(strategy.name)
    return sorted(found.values(), key=lambda one: (WIDTHS.index(one[0].bits), our_format(one[0]), one[1][0]))


def _runs_as(options: Options) -> tuple:
    """What a kernel sees. Kinds with the same numbers and the same method can only differ in their format; HQQ has real zeros
    where others have whole ones."""
    kinds = about(options.name).kinds
    if not options.kind:
        return options.name, options.bits, options.symmetric
    kind = kinds[options.kind]
    alike = [name for name, other in kinds.items() if other == kind]
    fixed = None if kind.group_size == ANY else kind.group_size
    return options.name, options.bits, options.symmetric, fixed, kind.activations, "HQQ" in kind.method, alike.index(options.kind)


def _activations(options: Options) -> int | None:
    kind = about(options.name).kinds.get(options.kind)
    return kind.activations if kind else None


def our_format(options: Options) -> str:
    """Our number format of as many bits, with activations rounded where the tool's are."""
    if options.bits == 8:
        return "int8-a8" if _activations(options) == 8 else "int8"
    return f"int{options.bits}-g128"


def _layers(shape: Shape, format: str, phase: str) -> dict[str, nn.Module]:
    """Our layer in a format, and in bf16 in the form that is fastest for the phase."""
    random = torch.Generator().manual_seed(0)
    form, _ = fastest_form(parts.random_tensor(shape.linears["mlp.gate_proj"], CPU, random), ROWS[phase])
    return {one: parts.build_layer(shape, one, form, CPU, random)[0] for one in ("bf16", format)}


def _rows(
    options: Options, names: list[str], ours: str, layers: dict, models: dict[str, Path], shape: Shape
) -> list[Row]:
    """Decode and prefill of one setting against our format."""
    rows, threads = [], torch.get_num_threads()
    facts = {"strategies": names, "format": ours}
    try:
        with tool(options, models["layer"], models["rest"], CONTEXT, PROMPT, threads, VOCAB) as guest:
            for phase in ROWS:
                times = _take_turns(phase, layers[phase], guest, shape)
                theirs, mine = times["tool"], times[ours]
                told = {name: _figure(values) for name, values in times.items()}
                how = ", ".join(f"{name} {value[0]:.1f} ms" for name, value in told.items())
                how += f"; {guest.about['runtime']}; {len(theirs)} rounds, {threads} threads"
                own = facts | {"phase": phase, "tool_ms": told["tool"], "ours_ms": told[ours], "bf16_ms": told["bf16"]}
                own |= {"speedup": time_ratio(times["bf16"], theirs), "rest_ms": _rest(guest, phase, len(theirs))}
                rows.append(replace(judge(_title(phase, ours, names), ">= 1", time_ratio(theirs, mine), "times", how), facts=own))
    except UserError as error:
        left = [phase for phase in ROWS if phase not in {row.facts["phase"] for row in rows}]
        rows += _failed(names, ours, str(error).splitlines()[0][:300], left)
    return rows


def _title(phase: str, ours: str, names: list[str]) -> str:
    return f"72B layer, {phase}: our {ours} over {names[0].removeprefix('tool-')}"


def _failed(names: list[str], ours: str, why: str, phases: Iterable[str]) -> list[Row]:
    """Rows of phases that were not measured."""
    facts = {"strategies": names, "format": ours, "error": why}
    rows = {phase: missing(_title(phase, ours, names), ">= 1", "times", why) for phase in phases}
    return [replace(row, facts=facts | {"phase": phase}) for phase, row in rows.items()]


def _take_turns(phase: str, layers: dict[str, nn.Module], guest: Guest, shape: Shape) -> dict[str, np.ndarray]:
    """Milliseconds of the layer by format, and of the tool, in interleaved rounds; fewer where a round takes long."""
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        work = parts.Workload(shape, ROWS[phase], CONTEXT if phase == "decode" else 0, CPU, random)
        calls: dict[str, Any] = {name: [partial(work.run, layer)] for name, layer in layers.items()}
        calls["tool"] = [partial(guest.ask, phase)]
        first = time_rounds(calls, 1, CPU, batches=0).rounds
        slowest = sum(float(values[0]) for values in first.values()) / 1e3
        rounds = int(np.clip(SECONDS[phase] / slowest, *ROUNDS))
        times = dict(time_rounds(calls, rounds, CPU, batches=int(slowest < SLOW)).rounds)
    return times | {"tool": guest.milliseconds(phase, "layer", rounds)}


def _figure(values: np.ndarray) -> tuple[float, float, float]:
    return tuple(round(one, 4) for one in median_interval(values))


def _rest(guest: Guest, phase: str, last: int) -> float:
    return round(float(np.median([one["rest"] for one in guest.rounds[phase][-last:]])), 4)
