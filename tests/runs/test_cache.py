"""What makes a strategy run again, and what does not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_project import BODIES, PACKAGE, PLAIN, write_notebook, write_weights

from qlib.params import from_dict, load_strategies
from qlib.runs import key
from qlib.runs import imports
from qlib.runs.imports import reach
from qlib.runs.key import differences, key_of, key_parts
from qlib.runs.state import state_of


def keys(project) -> dict[str, str]:
    strategies = load_strategies(sorted((project.root / "params").glob("*.yaml")), project.root)
    return {s.name: key_of(key_parts(s, project.root)) for s in strategies}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in after if before.get(name) != after[name]}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_second_run_executes_nothing_and_a_change_exactly_its_own(project):
    for name in ("one", "two", "three"):
        project.add(name)
    assert project.call("run").code == 0
    assert sorted(project.executions()) == ["one", "three", "two"]

    second = project.call("run")
    assert second.code == 0 and "all are up to date" in second.err and project.executions() == []

    edit(project.root / "notebooks" / "plain.ipynb", "# A small notebook", "# A small notebook, better explained")
    edit(project.root / "params" / "two.yaml", "two seconds", "three seconds")
    edit(project.root / "params" / "two.yaml", '"Plain"', '"Two"')
    assert project.call("run").code == 0 and project.executions() == []
    record = json.loads((project.folder("two") / "record.json").read_text())
    assert record["title"]["en"] == record["params"]["title"]["en"] == "Two"

    project.add("two", seed=4)
    why = project.call("list", "--why").out
    assert "two: out of date\n    parameters seed: 0 -> 4\n" in why and "one: done" in why
    assert project.call("run").code == 0 and project.executions() == ["two"]


def test_overrides_do_not_take_the_place_of_the_strategy(project):
    project.add("one")
    assert project.call("run", "one", "-p", "seed=7").code == 0
    assert project.executions()[0].startswith("one+")
    listed = {line.split()[0]: line.split(maxsplit=2)[2] for line in project.call("list").out.splitlines()[1:]}
    assert listed["one"].startswith("never run")
    assert any(name.startswith("one+") and state.startswith("done") for name, state in listed.items())
    shown = project.call("show", next(name for name in listed if "+" in name), "--json")
    assert json.loads(shown.out)["params"]["seed"] == 7


def test_what_the_key_depends_on(project):
    for name in ("one", "slow", "raises"):
        project.add(name)
    first = keys(project)
    write_notebook(project.root / "notebooks" / "slow.ipynb", BODIES["slow"] + "\n# a comment is code as well")
    assert changed(first, keys(project)) == {"slow"}
    first = keys(project)
    write_weights(project.root / "model", 2.0)
    assert changed(first, keys(project)) == {"one", "slow", "raises"}
    first = keys(project)
    (project.root / "text.txt").write_text("other text\n")
    assert changed(first, keys(project)) == {"one", "slow", "raises"}
    first = keys(project)
    project.add("raises", evaluation={"text": "text.txt", "items": 5})
    assert changed(first, keys(project)) == {"raises"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """A copy of the package's sources with a second pass, to be edited."""
    copy = tmp_path / "copy" / "qlib"
    for file in PACKAGE.rglob("*.py"):
        target = copy / file.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (copy / "quantize" / "other.py").write_text("from qlib.quantize.grid import Grid\nimport scipy.linalg\n")
    names = {"rtn": "qlib.quantize.rtn", "other": "qlib.quantize.other"}
    monkeypatch.setattr(key, "pass_names", lambda: names)
    return copy


def test_sources_that_a_strategy_reaches(project, package):
    write_notebook(
        project.root / "notebooks" / "quantized.ipynb",
        "subject = qlib.load(model)\nqlib.compress(subject, recipe)\nqlib.evaluate(subject, evaluation)",
    )
    plain = from_dict(PLAIN, "test")
    rtn = replace(plain, name="rtn", notebook="quantized.ipynb", recipe=[{"pass": "rtn"}])
    other = replace(rtn, name="other", recipe=[{"pass": "other"}])

    def parts() -> dict[str, dict]:
        return {s.name: key_parts(s, project.root, package) for s in (plain, rtn, other)}

    def touched(module: str) -> set[str]:
        before = parts()
        file = package / f"{module}.py"
        file.write_text(file.read_text() + "\nTOUCHED = True\n")
        after = parts()
        return {name for name in after if key_of(before[name]) != key_of(after[name])}

    assert touched("quantize/rtn") == {"rtn"}
    assert touched("quantize/other") == {"other"}
    assert touched("walk") == {"rtn", "other"}
    assert touched("compress") == {"rtn", "other"}
    assert touched("quantize/grid") == {"rtn", "other"}
    assert touched("models/families") == {"rtn", "other"}
    assert touched("record") == {"plain", "rtn", "other"}
    for neutral in ("report/show", "cli", "runs/execute", "params/checks", "schema", "errors", "progress", "__init__"):
        assert touched(neutral) == set(), neutral

    found = parts()
    assert "scipy" in found["other"]["packages"] and "scipy" not in found["rtn"]["packages"]
    assert found["rtn"]["packages"]["torch"]
    assert not {"qlib", "os", "json"} & set(found["rtn"]["packages"])
    assert "torch" not in found["plain"]["packages"]
    assert "qlib.layers.gpu" in found["rtn"]["sources"]  # but what only GPUs run does not count on a CPU
    assert "qlib.layers.triton_kernels" not in found["rtn"]["sources"] and "triton" not in found["rtn"]["packages"]


def test_differences_say_what_changed():
    old = {
        "notebook": "a" * 64,
        "parameters": {"recipe": [{"pass": "rtn", "bits": 4}], "seed": 0},
        "sources": {"qlib.walk": "b", "qlib.gone": "c"},
        "packages": {"torch": "2.13.0"},
        "model": "d" * 64,
        "data": {"reference": "e"},
        "device": "cpu",
    }
    new = {
        "notebook": "A" * 64,
        "parameters": {"recipe": [{"pass": "rtn", "bits": 3}], "seed": 0},
        "sources": {"qlib.walk": "B"},
        "packages": {"torch": "2.14.0"},
        "model": "D" * 64,
        "data": {"reference": "E"},
        "device": "nvidia-h200",
    }
    assert differences(old, new) == [
        "notebook changed",
        "parameters recipe[0].bits: 4 -> 3",
        "sources qlib.gone gone",
        "sources qlib.walk changed",
        'packages torch: "2.13.0" -> "2.14.0"',
        "model changed",
        "data reference changed",
        'device: "cpu" -> "nvidia-h200"',
    ]
    assert differences(old, old) == []


def test_reach_follows_imports_inside_functions_but_not_those_for_type_checkers(tmp_path):
    package = tmp_path / "qlib"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("VERBS = {'load': 'qlib.load_it'}\n")
    (package / "part" / "__init__.py").write_text("")
    (package / "load_it.py").write_text(
        "import json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qlib import only_types\n"
        "def load():\n    from qlib.part.deep import thing\n    import numpy.linalg\n"
    )
    (package / "part" / "deep.py").write_text("from . import near\nfrom .near import x\nfrom ..above import y\n")
    for name in ("part/near", "above", "only_types", "unused"):
        (package / f"{name}.py").write_text("x = y = 1\n")
    found = reach([], "import qlib\nimport torch.nn as nn\nqlib.load('m')", package)
    assert set(found.sources) == {"qlib.load_it", "qlib.part", "qlib.part.deep", "qlib.part.near", "qlib.above"}
    assert found.packages == {"numpy", "torch"}


def test_comments_docstrings_and_layout_change_no_hash_but_code_and_other_texts_do(tmp_path):
    (tmp_path / "__init__.py").write_text("VERBS = {'load': 'qlib.part'}\n")
    plain = 'X = "a"\n\n\ndef load():\n    """Load."""\n    return X\n'

    def digest(text):
        (tmp_path / "part.py").write_text(text)
        imports._read.cache_clear()
        return reach([], "qlib.load()", tmp_path).sources["qlib.part"]

    first = digest(plain)
    assert digest(plain.replace("Load.", "Load it.")) == first
    assert digest(plain.replace("return X", "return (\n        X  # why\n    )")) == first
    assert digest(plain.replace('"a"', '"b"')) != first
    assert digest(plain.replace("return X", "return X + X")) != first


def test_c_files_count_for_the_module_that_names_their_folder(package):
    def sources() -> dict[str, str]:
        imports._read.cache_clear()  # it goes by the date of the Python file
        return reach(["qlib.layers.native"], "", package).sources

    header = package / "layers" / "kernels" / "common.h"
    header.parent.mkdir()
    header.write_text("// one\n")
    before = sources()
    header.write_text("// another\n")
    after = sources()
    assert {name for name in after if after[name] != before[name]} == {"qlib.layers.build"}


def test_state_without_a_key_is_unverified(project):
    strategy = load_strategies([project.add("one")], project.root)[0]
    state = state_of(strategy, project.root, project.runs)
    assert state.state == "never run"
    state.folder.mkdir(parents=True)
    (state.folder / "result.json").write_text("{}")
    assert state_of(strategy, project.root, project.runs).state == "unverified"


def test_files_are_hashed_again_only_when_they_change(project, monkeypatch, tmp_path):
    from qlib.runs import subject_hash

    monkeypatch.setenv("QLIB_CACHE", str(tmp_path / "cache"))
    read = []
    digest = subject_hash.hashlib.file_digest
    monkeypatch.setattr(subject_hash.hashlib, "file_digest", lambda *a: (read.append(1), digest(*a))[1])
    first = subject_hash.model_hash("model", project.root)
    assert subject_hash.model_hash("model", project.root) == first and len(read) == 3
    write_weights(project.root / "model", 2.0, 3.0)
    assert subject_hash.model_hash("model", project.root) != first and len(read) == 4
