"""Strategy files: every kind of bad input is one clear line, and the JSON Schema says the same as the code."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from qlib import params, schema
from qlib.errors import UserError
from qlib.options import options_of
from qlib.params import FAMILIES, Strategy, from_dict, load_strategies, load_strategy, override, to_dict
from qlib.record import REQUIRED
from qlib.yamltext import parse_assignments, parse_yaml

ROOT = Path(__file__).parent.parent
GOOD = {
    "name": "rtn-int4",
    "title": {"en": "Rounding, 4 bits", "zh": "四舍五入,4 比特"},
    "family": "weight_quantization",
    "tier": "core",
    "notebook": "weight_quantization.ipynb",
    "recipe": [{"pass": "rtn", "bits": 4}],
}
TRAINING = {"family": "training", "recipe": [], "formats": ["fp32", "bf16"]}


def problem(**changes: Any) -> str:
    values = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    with pytest.raises(UserError) as caught:
        from_dict(values, "params/x.yaml")
    return str(caught.value)


def test_a_good_file_is_completed_with_defaults():
    strategy = from_dict(GOOD, "x")
    assert strategy.model == "reference-2" and strategy.seed == 0
    assert (strategy.calibration.samples, strategy.evaluation.bootstrap) == (128, 1000)
    step = strategy.recipe[0]
    assert step | {"pass": "rtn", "bits": 4, "group_size": 128, "symmetric": False, "element": "int"} == step
    assert from_dict(to_dict(strategy), "again") == strategy
    assert json.loads(json.dumps(to_dict(strategy))) == to_dict(strategy)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"recpie": []}, "recpie: unknown field (did you mean 'recipe'?); allowed: name, title, family"),
        ({"evaluation": {"item": 3}}, "evaluation.item: unknown field (did you mean 'items'?); allowed: text,"),
        ({"seed": "one"}, "seed: 'one' is not allowed; allowed: an integer of at least 0"),
        ({"seed": 1.0}, "seed: 1.0 is not allowed; allowed: an integer of at least 0"),
        ({"seed": True}, "seed: true is not allowed; allowed: an integer of at least 0"),
        ({"seed": -1}, "seed: -1 is not allowed; allowed: an integer of at least 0"),
        ({"seed": float("nan")}, "seed: nan is not a finite number"),
        ({"seed": "1e3"}, "seed: '1e3' is not allowed; allowed: an integer of at least 0 (YAML reads this as text"),
        ({"name": False}, "name: false is not allowed; allowed: a text (YAML reads yes, no, on and off as"),
        ({"name": "../x"}, "name: '../x' is not allowed; allowed: lower-case letters"),
        ({"name": ...}, "name: is missing; allowed: a text"),
        ({"title": "words"}, "title: 'words' is not a mapping; allowed: en, zh"),
        ({"title": {"en": "words"}}, "title.zh: is missing; allowed: a text"),
        ({"tier": "fulll"}, "tier: 'fulll' is not allowed (did you mean 'full'?); allowed: smoke, core, full"),
        ({"family": "quantization"}, "family: 'quantization' is not allowed (did you mean 'weight_quantization'?); al"),
        ({"notebook": "../x.ipynb"}, "notebook: '../x.ipynb' is not allowed; allowed: the name of a file in"),
        ({"calibration": {"samples": 0}}, "calibration.samples: 0 is not allowed; allowed: an integer of at least 1"),
        ({"evaluation": {"tasks": "arc"}}, "evaluation.tasks: 'arc' is not allowed; allowed: a list of texts"),
        ({"recipe": []}, "recipe: is empty; allowed for family weight_quantization: at least one pass"),
        ({"recipe": ...}, "recipe: is empty; allowed for family weight_quantization: at least one pass"),
        ({"recipe": "rtn"}, "recipe: 'rtn' is not allowed; allowed: a list of mappings"),
        ({"recipe": ["rtn"]}, "recipe[0]: 'rtn' is not allowed; allowed: a mapping with 'pass'"),
        ({"recipe": [{"bits": 4}]}, "recipe[0]: {'bits': 4} is not allowed; allowed: a mapping with 'pass'"),
        ({"recipe": [{"pass": "rnt"}]}, "recipe[0].pass: 'rnt' is unknown (did you mean 'rtn'?); allowed:"),
        ({"recipe": [{"pass": "rtn", "bits": 5.5}]}, "recipe[0].bits: 5.5 is not allowed; allowed: 2, 3, 4, 5, 6, 8"),
        ({"recipe": [{"pass": "rtn", "bits": 4.0}]}, "recipe[0].bits: 4.0 is not allowed; allowed: 2, 3, 4, 5, 6, 8"),
        ({"recipe": [{"pass": "rtn", "bts": 4}]}, "recipe[0].bts: unknown field (did you mean 'bits'?); allowed: bit"),
        ({"recipe": [{"pass": "rtn", "symmetric": 1}]}, "recipe[0].symmetric: 1 is not allowed; allowed: true or"),
        ({"recipe": [{"pass": "rtn", "group_size": 7}]}, "recipe[0].group_size: 7 is not allowed; allowed: 32, 64,"),
        ({"formats": ["int8"]}, "formats: must be given for families speed, training and scale, and only there"),
        ({"family": "baseline"}, "recipe: is not empty; family baseline changes no weights"),
        (TRAINING | {"formats": ["fp32", "fp8"]}, "formats: 'fp8' is not allowed (did you mean 'fp32'?); allowed: fp32"),
        (TRAINING | {"formats": ["bf16"]}, "formats: ['bf16'] is not allowed; allowed: fp32 and others of"),
        (TRAINING | {"formats": []}, "formats: must be given for families speed, training and scale, and only there"),
        (TRAINING | {"training": {"batch_tokens": 64}}, "training.batch_tokens: 64 is not allowed; allowed: at"),
        (TRAINING | {"training": {"seed": 1}}, "training.seed: unknown field (did you mean 'seeds'?); allowed:"),
    ],
)
def test_bad_values_are_one_line(changes, line):
    found = problem(**changes)
    assert found.startswith(f"params/x.yaml: {line}") and "\n" not in found


def test_several_problems_are_a_line_each():
    lines = problem(seed="one", teir="core", recipe=[{"pass": "rtn", "bits": 7}]).splitlines()
    assert len(lines) == 3 and all(line.startswith("params/x.yaml: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "is not YAML (line 1)"),
        ("a: 1\nb: 2\na: 3\n", "a: is given twice"),
        ("x: {y: 1, y: 2}", "y: is given twice"),
        ("a: 2024-13-45", "is not YAML"),
        ("a: !!python/object:os.system 1", "is not YAML (line 1): could not determine a constructor"),
    ],
)
def test_bad_yaml(text, line):
    with pytest.raises(UserError, match=r"^file: ") as caught:
        parse_yaml(text, "file")
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks" / "weight_quantization.ipynb").write_text("{}")
    return tmp_path / "params"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"- a list", "x.yaml: is not a mapping of fields"),
        (b"", "x.yaml: is not a mapping of fields"),
        (b"\xff\xfe\x00", "x.yaml: is not UTF-8"),
        (json.dumps(GOOD | {"notebook": "weights.ipynb"}).encode(), "(did you mean 'weight_quantization.ipynb'?)"),
        (json.dumps(GOOD | {"seed": 1}).encode() + b"\nx", "x.yaml: is not YAML"),
    ],
)
def test_bad_files(folder, content, line):
    (folder / "x.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_strategy(folder / "x.yaml")
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_names_used_twice(folder):
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text("# a comment that says what to expect\n" + json.dumps(GOOD))
    with pytest.raises(UserError, match=r"two\.yaml: name: 'rtn-int4' is already used by .*one\.yaml"):
        load_strategies([folder / "one.yaml", folder / "two.yaml"])
    with pytest.raises(UserError, match=r"on\.yaml: no such file \(did you mean 'one\.yaml'\?\)"):
        load_strategy(folder / "on.yaml")
    assert load_strategy(folder / "one.yaml").name == "rtn-int4"
    assert params.expectation(folder / "one.yaml") == "a comment that says what to expect"


def test_override():
    strategy = from_dict(GOOD, "x")
    changes = parse_assignments(["recipe.0.bits=3", "evaluation.items=50", "evaluation.tasks=[arc_easy]"])
    other = override(strategy, changes)
    assert other.recipe[0]["bits"] == 3 and other.evaluation.items == 50 and other.evaluation.tasks == ["arc_easy"]
    assert override(strategy, parse_assignments(["recipe=[{pass: rtn, bits: 3}]"])).recipe == other.recipe
    assert override(strategy, {"recipe[0].bits": 3}).recipe == other.recipe
    assert strategy.recipe[0]["bits"] == 4


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("sed=1", "-p sed: 'sed' is unknown (did you mean 'seed'?); allowed: name,"),
        ("evaluation.itms=1", "-p: evaluation.itms: unknown field (did you mean 'items'?)"),
        ("recipe.1.bits=3", "-p recipe.1.bits: '1' is unknown; allowed: 0"),
        ("recipe.0.bits=5.5", "-p: recipe[0].bits: 5.5 is not allowed"),
        ("seed.x=1", "-p seed.x: 0 has no fields of its own"),
        ("seed", "-p seed: is not key=value"),
        ("seed=[1", "-p seed: is not YAML"),
    ],
)
def test_bad_overrides(pair, line):
    with pytest.raises(UserError) as caught:
        override(from_dict(GOOD, "x"), parse_assignments([pair]))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@dataclass(frozen=True)
class _Inner:
    share: float = field(default=0.5, metadata={"minimum": 0.0})


@dataclass(frozen=True)
class _Outer:
    rate: float
    inner: _Inner = _Inner()
    kind: Literal["no", "yes"] | None = None
    widths: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rate": "1e-3"}, "rate: '1e-3' is not allowed; allowed: a number (YAML reads this as text; write 0.001)"),
        ({"rate": float("inf")}, "rate: inf is not a finite number"),
        ({"rate": 1, "inner": {"share": -0.1}}, "inner.share: -0.1 is not allowed; allowed: a number of at least 0.0"),
        ({"rate": 1, "kind": False}, "kind: false is not allowed; allowed: no, yes, null (YAML reads yes, no, on"),
        ({"rate": 1, "inner": {1: 2}}, "inner.1: unknown field; allowed: share"),
        ({"rate": {"a": {1: 2}}}, "rate: the key 1 is not a text; quote it"),
    ],
)
def test_traps_of_yaml(values, line):
    built, problems = schema.check(_Outer, values)
    assert built is None and len(problems) == 1 and problems[0].startswith(line)


def test_numbers_may_be_written_as_integers():
    built, problems = schema.check(_Outer, {"rate": 1, "inner": {"share": 1}})
    assert not problems and built.rate == 1.0 and isinstance(built.rate, float)


def test_options_are_read_without_importing_the_pass(tmp_path, monkeypatch):
    source = '''
from dataclasses import dataclass
from typing import Literal
import a_package_that_is_not_there
from qlib.errors import UserError

UNUSED = a_package_that_is_not_there.thing
WIDTHS = Literal[2, 4]

@dataclass(frozen=True)
class Options:
    """Options of a pass.

    Args:
        width: of a code,
            in bits.
    """

    width: WIDTHS = 4

    def __post_init__(self):
        if self.width == 2:
            raise UserError("width 2 needs more than this")

    def grid(self) -> a_package_that_is_not_there.Grid:
        return a_package_that_is_not_there.Grid(self.width)
'''
    (tmp_path / "lonely_pass.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(params.checks, "pass_names", lambda: {"lonely": "lonely_pass"})
    kind, hints = options_of("lonely_pass")
    assert hints == {"width": Literal[2, 4]} and kind().width == 4
    assert schema.docs_of(kind) == {"width": "of a code, in bits."}
    assert problem(recipe=[{"pass": "lonely", "width": 2}]) == "params/x.yaml: recipe[0]: width 2 needs more than this"
    assert "allowed: 2, 4" in problem(recipe=[{"pass": "lonely", "width": 3}])


def test_committed_schema_is_current():
    committed = json.loads((ROOT / "params" / "schema.json").read_text(encoding="utf-8"))
    assert committed == params.schema(), "run `qlib schema`"


def test_schema_agrees_with_the_code():
    described = params.schema()
    jsonschema.Draft202012Validator.check_schema(described)
    validator = jsonschema.Draft202012Validator(described)
    speed = {k: v for k, v in GOOD.items() if k != "recipe"} | {"family": "speed", "formats": ["int8"]}
    for good in (GOOD, to_dict(from_dict(GOOD, "x")), speed):
        from_dict(good, "x")
        assert validator.is_valid(good)
    wide = {"recipe": [{"pass": "rtn", "bits": 7}]}
    for change in ({"recipe": []}, wide, {"sed": 1}, {"seed": -1}, {"family": "baseline"}):
        assert problem(**change) and not validator.is_valid(GOOD | change)
    for name in described["properties"]:
        assert described["properties"][name]["description"]


def test_every_family_has_its_measurements():
    assert set(FAMILIES) - set(REQUIRED) == {"scale"}, "which needs none: its figures lie under its formats"


def test_strategy_files_of_the_project():
    files = sorted((ROOT / "params").glob("*.yaml"))
    validator = jsonschema.Draft202012Validator(params.schema())
    strategies = load_strategies(files, ROOT)
    for file, strategy in zip(files, strategies):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert strategy.name == file.stem
        assert params.expectation(file), f"{file.name}: the first line says what to expect"
        assert lines[0].startswith("# ") and lines[1] == "# yaml-language-server: $schema=schema.json", file.name
        assert validator.is_valid(parse_yaml("\n".join(lines), file.name))
    assert isinstance(strategies, list) and all(isinstance(s, Strategy) for s in strategies)
