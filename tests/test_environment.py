"""pyproject.toml, requirements.lock and environment.yml name the same packages, and what the project promises is in."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROMISED = ("jupyter", "papermill", "torch", "transformers", "auto-gptq", "seaborn", "nbconvert")


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "every line of the lock is name==version"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins}


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}


def test_the_lock_satisfies_every_declared_range():
    pins = locked()
    for name, requirement in declared().items():
        assert name in pins, f"{name} is not locked"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is outside {requirement.specifier}"


def test_what_the_project_promises_is_declared_and_locked():
    pins, ranges = locked(), declared()
    for name in PROMISED:
        assert canonicalize_name(name) in pins and canonicalize_name(name) in ranges
    assert pins["torch"] == "2.13.0"


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("\n]")[0]
    explained = False
    for line in filter(None, map(str.strip, text.splitlines())):
        explained = line.startswith("#") or "#" in line or explained
        assert explained, line


def test_conda_installs_the_very_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert environment[0] == "python=3.11" and "pip" in environment
    assert environment[-1] == {"pip": ["-r requirements.lock"]} and len(environment) == 3


def test_the_lock_is_complete():
    """Whatever a locked package requires here is locked too; platform libraries of torch are left to the resolver."""
    pins = locked()
    for name in pins:
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(requirement.name)
            if not needed.startswith(("nvidia-", "cuda-", "triton", "setuptools", "pip")):
                assert needed in pins, f"{name} requires {needed}, which is not locked"


def test_what_runs_here_is_what_is_locked():
    pins = locked()
    differing = [n for n, v in pins.items() if metadata.version(n).partition("+")[0] != v.partition("+")[0]]
    assert not differing, f"installed versions differ from the lock: {differing}"
