"""Environments of tools, with a tool that is a few bytes and lies on this machine: nothing is downloaded."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import zipfile
from pathlib import Path

import psutil
import pytest

from qlib.cli import main
from qlib.errors import UserError
from qlib.tools.environments import SOURCE, environment_of


def write_wheel(folder: Path, version: str) -> None:
    """A wheel of the package `faketool` with one module."""
    info = f"faketool-{version}.dist-info"
    with zipfile.ZipFile(folder / f"faketool-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("faketool.py", f"version = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: faketool\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the lock of one tool, and arguments with which pip asks no index."""
    for folder in ("params/tools", "notebooks", "wheels"):
        (tmp_path / folder).mkdir(parents=True)
    write_wheel(tmp_path / "wheels", "1.0")
    (tmp_path / "params/tools/fake-tool.lock").write_text("# A tool for tests.\nfaketool==1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLIB_CACHE", str(tmp_path / "cache"))  # or main would set it for all later tests
    monkeypatch.setenv("QLIB_TOOLS", str(tmp_path / "environments"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path


def test_a_tool_that_is_built_with_options_is_built_anew(project, monkeypatch):
    """pip keeps wheels that it built, and takes them whatever the options are."""
    environment, called = environment_of("fake-tool"), []
    environment.lock.write_text('faketool==1.0 --config-settings="cmake.define.A=-b -c"\n')
    assert environment.version == "1.0"

    def call(self, command, log, what):
        called.append(command)
        if what == "pip":
            raise UserError("enough")

    monkeypatch.setattr(type(environment), "_call", call)
    for text, anew in ((environment.lock.read_text(), True), ("faketool==1.0\n", False)):
        environment.lock.write_text(text)
        with pytest.raises(UserError, match="enough"):
            environment.install()
        assert ("--no-cache-dir" in called[-1]) == anew


@pytest.mark.slow
def test_life_of_an_environment(project, capfd):
    pip = f"--pip-args=--no-index --find-links {project / 'wheels'}"
    environment = environment_of("fake-tool")
    assert environment.state == "not installed" and environment.version == "1.0"
    with pytest.raises(UserError, match="fake-tool is not installed: run `qlib tools install fake-tool`"):
        environment.python()

    environment.lock.write_text("faketool==9.9\n")  # pip fails: what is left does not look finished
    assert main(["tools", "install", "fake-tool", pip]) == 1
    said = capfd.readouterr().out
    assert "pip failed with code 1" in said and str(environment.log) in said and "faketool==9.9" in said
    assert environment.state == "failed"
    with pytest.raises(UserError, match="fake-tool 9.9 could not be installed: pip failed with code 1 .*faketool==9.9"):
        environment.python()  # what its strategies say in the report

    environment.lock.write_text("faketool==1.0\n")
    assert environment.state == "unfinished"  # another lock: nothing is known of it
    assert main(["tools", "install", "--all", pip]) == 0
    assert "fake-tool: 1.0 installed in" in capfd.readouterr().out and environment.state == "installed"
    assert main(["tools", "install", "fake-tool"]) == 0
    assert "is installed already" in capfd.readouterr().out

    code = "import faketool, qlib; print(faketool.version, qlib.__file__)"
    found = subprocess.run([environment.python(), "-c", code], capture_output=True, text=True, cwd=project)
    assert found.stdout.split() == ["1.0", str(SOURCE / "qlib" / "__init__.py")]
    kernel = json.loads((project / "environments/share/jupyter/kernels/qlib-fake-tool/kernel.json").read_text())
    assert kernel["argv"][:3] == [str(environment.python()), "-m", "ipykernel_launcher"]

    assert main(["tools", "list"]) == 0
    row = capfd.readouterr().out.splitlines()[1].split()
    assert row[:3] == ["fake-tool", "1.0", "installed"] and row[-1] == "qlib-fake-tool"
    assert row[-2].startswith("3.11.")
    environment.lock.write_text("faketool==1.1\n")
    assert environment.state == "out of date"
    environment.lock.write_text("faketool==1.0\n")
    (environment.folder / ".installed").unlink()  # as after an interruption
    assert environment.state == "unfinished"
    assert main(["tools", "remove", "fake-tool"]) == 0
    assert "freed" in capfd.readouterr().out
    assert not environment.folder.exists() and not environment.kernel.exists()


def state_in_list(capfd) -> str:
    capfd.readouterr()
    assert main(["tools", "list"]) == 0
    row = capfd.readouterr().out.splitlines()[1]
    return re.split(" {2,}", row)[2]


@pytest.mark.slow
def test_without_network_is_one_line_and_leaves_nothing_that_looks_installed(project, capfd, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # of nobody, once it is closed
    pip = f"--pip-args=--retries 1 --index-url http://127.0.0.1:{port}/simple"
    assert main(["tools", "install", "fake-tool", pip]) == 1
    environment = environment_of("fake-tool")
    said = capfd.readouterr().out.splitlines()
    assert said[1:] == [f"fake-tool: no network: pip could not reach its index (log: {environment.log})"]
    assert state_in_list(capfd) == "failed" and not environment.kernel.exists()
    with pytest.raises(UserError, match="^fake-tool 1.0 could not be installed: no network: pip could not reach its index$"):
        environment.python()


@pytest.mark.slow
def test_a_killed_install_is_not_installed_and_the_next_one_repairs_it(project, capfd, monkeypatch):
    """pip waits for an index that accepts the connection and never answers: there it is killed."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with socket.create_server(("127.0.0.1", 0)) as server:
        index, codes = f"--pip-args=--index-url http://127.0.0.1:{server.getsockname()[1]}/simple", []
        install = threading.Thread(target=lambda: codes.append(main(["tools", "install", "fake-tool", index])))
        install.start()
        server.settimeout(60)
        connection, _ = server.accept()
        pip = [one for one in psutil.Process().children() if "pip" in one.cmdline()]
        os.kill(pip[0].pid, signal.SIGKILL)
        install.join(60)
        connection.close()
    assert codes == [1] and "fake-tool: pip failed with code -9" in capfd.readouterr().out
    assert state_in_list(capfd) == "failed" and not environment_of("fake-tool").kernel.exists()
    assert main(["tools", "install", "fake-tool", f"--pip-args=--no-index --find-links {project / 'wheels'}"]) == 0
    assert state_in_list(capfd) == "installed"


def test_bad_input_is_one_line(project, capfd):
    assert main(["tools", "install", "faketool"]) == 2
    assert capfd.readouterr().err == "faketool: no such tool (did you mean 'fake-tool'?); allowed: fake-tool\n"
    assert main(["tools", "install"]) == main(["tools", "remove", "fake-tool", "--all"]) == 2
    assert capfd.readouterr().err.count("tools: name some or say --all") == 2


def test_locks_are_complete_and_agree():
    for lock in sorted((SOURCE / "params" / "tools").glob("*.lock")):
        lines = lock.read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        assert lines[0].startswith("# ") and all(line.count("==") == 1 for line in packages), lock.name
        assert "torch==2.13.0" in packages and any(line.startswith("ipykernel==") for line in packages), lock.name
        assert environment_of(lock.stem, SOURCE).version != "?", lock.name
