"""Quantized strategies fall into widths and groups of methods; each width has its own order and its own best."""

import re

import pytest

from qlib.errors import UserError
from qlib.report.book import collect
from qlib.report.fill import book_words
from qlib.report.quantized import METHODS, arranged, by_width, group_of, heading, width_of
from qlib.report.tables import comparison

RECIPES = {
    "rtn-int8": ([{"pass": "rtn", "bits": 8}], 17.0, 8.03),
    "rtn-int4": ([{"pass": "rtn", "bits": 4}], 18.0, 4.16),
    "gptq-int4-g32": ([{"pass": "gptq", "bits": 4}], 17.2, 4.63),
    "awq-int3": ([{"pass": "awq"}, {"pass": "rtn", "bits": 3}], 20.0, 3.16),
    "gptq-int3": ([{"pass": "gptq", "bits": 3}], 19.5, 3.15),
    "kv-int8": ([{"pass": "kv_cache", "bits": 8}], 16.8, 16.0),
}


@pytest.fixture
def quantized(tmp_path, make):
    folder = tmp_path / "reference-2" / "cpu"
    measured = make.quality(90.0, 0.0, 16.7, 3.0, 16, "baseline")
    measured["size.kv_bytes_per_token"] = make.number(2000, "bytes")
    make.write(folder / "baseline", make.record("baseline", "baseline", measured))
    for name, (recipe, perplexity, bits) in RECIPES.items():
        measured = make.quality(89.0, -1.0, perplexity, bits / 5, bits)
        measured["quality.perplexity_ratio"] = make.number(perplexity / 16.7, "ratio", 0.01)
        measured["size.kv_bytes_per_token"] = make.number(1000 if "kv" in name else 2000, "bytes")
        content = make.record(name, "weight_quantization", measured)
        content["params"]["recipe"] = recipe
        make.write(folder / name, content)
    make.write(folder / "broken", {}, state="failed")
    return collect(tmp_path, tmp_path / "none")


def test_widths_and_groups(quantized):
    widths = {e.name: width_of(e) for e in quantized.strategies}
    assert widths["gptq-int4-g32"] == 4 and widths["rtn-int8"] == 8 and widths["broken"] is None
    groups = {e.name: group_of(e) for e in quantized.strategies}
    assert groups["awq-int3"] == "transforms" and groups["gptq-int3"] == "gptq" and groups["kv-int8"] == "cache"
    assert groups["baseline"] == ""
    assert heading(quantized.get("kv-int8")) == "Weight quantization, weights not compressed"
    assert heading(quantized.get("baseline")) == "Baseline" and heading(quantized.get("baseline"), short=True) == ""


def test_a_width_is_ordered_by_perplexity(quantized):
    names = [e.name for e in arranged(quantized.of(family="weight_quantization"))]
    assert names == ["kv-int8", "rtn-int8", "gptq-int4-g32", "rtn-int4", "gptq-int3", "awq-int3"]
    parts = by_width(quantized)
    assert list(parts) == ["5 bits or more", "4 bits", "3 bits"]
    assert {e.name for e in parts["3 bits"].strategies} == {"awq-int3", "gptq-int3"}


def test_each_width_has_a_heading_and_its_own_best(quantized):
    page = comparison(quantized, family="weight_quantization")._repr_html_()
    parts = re.split('<tr class="group">', page)[1:]
    titles = [re.search(r"</span> (.*?)</span>", part)[1] for part in parts]
    assert titles == ["Weights not compressed", "8 bits", "4 bits", "3 bits"]
    for part, winner, other in ((parts[2], "gptq-int4-g32", "rtn-int4"), (parts[3], "gptq-int3", "awq-int3")):
        ratios = dict(re.findall(r'#strategy-([\w-]+)".*?</th>(.*?)</tr>', part))
        assert "<strong>1.0" in ratios[winner] or "<strong>1.1" in ratios[winner]
        assert "<strong>1.0" not in ratios[other] and "<strong>1.1" not in ratios[other]
    assert "among those under the same heading" in page


def test_the_sentence_of_a_group_follows_the_records(quantized, tmp_path):
    say = book_words(quantized)
    assert say("methods: rounding").startswith("Best with 4 bits is rtn-int4, perplexity 18.0")
    assert "gptq-int4-g32" in say("methods: gptq") and "with 3 bits is gptq-int3" in say("methods: gptq")
    assert "kv-int8 holds 1.00\N{NO-BREAK SPACE}kB for each token, against 2.00" in say("methods: cache")
    assert say("methods: learned") == say("methods: tool") == "None has been measured yet."
    with pytest.raises(UserError, match="did you mean 'gptq'"):
        say("methods: gptqq")
    empty = book_words(collect(tmp_path / "none", tmp_path / "none"))
    assert {empty(f"methods: {group}") for group in METHODS} == {"None has been measured yet."}
