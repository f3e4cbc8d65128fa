"""What the benchmark of tools times: settings that run alike once, each beside our format of as many bits."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

from qlib.bench import bench_methods
from qlib.bench.bench_methods import ELSEWHERE, OURS
from qlib.bench.bench_tools import WIDTHS, our_format, settings_of
from qlib.errors import UserError
from qlib.evaluate.footprint import grid_of
from qlib.quantize.tool import Options
from qlib.recipe import read_recipe
from qlib.tools.about import about, tool_names

ROOT = Path(__file__).parents[2]


def test_every_strategy_is_in_one_setting_width_by_width():
    files = {file.stem for file in (ROOT / "params").glob("tool-*.yaml")}
    for by in ("runtime", "method"):
        found = settings_of(ROOT, by)
        names = [name for _, group in found for name in group]
        assert sorted(names) == sorted(files)
        widths = [options.bits for options, _ in found]
        assert widths == sorted(widths, key=WIDTHS.index)
    groups = [group for _, group in settings_of(ROOT)]
    together = [{"tool-nncf-int4_asym", "tool-nncf-int4_asym_awq", "tool-nncf-int4_asym_gptq"}, {"tool-hqq-int4", "tool-hqq-int4-g128"}]
    assert all(any(names <= set(group) for group in groups) for names in together)  # the same kernel
    alone = ("tool-llama-cpp-q4_0", "tool-llama-cpp-iq4_nl", "tool-llama-cpp-q4_k_m", "tool-bitsandbytes-nf4")
    assert all([name] in groups for name in alone)  # types of their own


def test_our_format_has_the_tools_bits():
    assert our_format(Options("gptqmodel", 3)) == "int3-g128"
    assert our_format(Options("torchao", 8, None, True, kind="int8")) == "int8"
    assert our_format(Options("torchao", 8, None, True, kind="int8-dynamic")) == "int8-a8"
    for options, _ in settings_of(ROOT):
        assert grid_of(our_format(options)).bits == options.bits


def test_methods_have_a_pass_of_ours():
    for recipe in OURS.values():
        read_recipe([*recipe[:-1], recipe[-1] | {"bits": 4, "group_size": 128}])
    methods = {kind.method for name in tool_names() for kind in about(name).kinds.values()} | {about(n).method for n in tool_names()}
    assert set(OURS) <= methods


def test_methods_are_timed_in_turns_until_the_time_is_over(monkeypatch):
    """Ours takes 2 s; the first tool 4, 6 and 8 s; the others fail."""
    asked, spent = [], iter([4.0, 6.0, 8.0])

    def run(options, *_, **__):
        asked.append(options)
        if options != asked[0]:
            raise UserError("no <wheel>\nand more")
        return MagicMock(seconds=next(spent))

    stand_ins = {"random_model": MagicMock(), "exclusive": nullcontext, "run_tool": run, "_seconds": lambda *_: 2.0}
    for name, stand_in in (stand_ins | {"_load_kernels": MagicMock()}).items():
        monkeypatch.setattr(bench_methods, name, stand_in)
    rows, late = bench_methods.measure(ROOT, lambda names: True)
    assert not late and (rows[0].measured, rows[0].low, rows[0].high, rows[0].met) == (3.0, 2.0, 4.0, True)
    assert rows[0].how.startswith("ours 2, 2, 2 s; its 4, 6, 8 s") and all(row.how == "not measured: no <wheel>" for row in rows[1:])
    names = [name for row in rows for name in row.facts["strategies"]]
    assert len(names) == len(set(names)) and not any(name.startswith(f"tool-{one}-int") for name in names for one in ELSEWHERE)
    assert bench_methods.measure(ROOT, lambda names: False) == ([], names)
