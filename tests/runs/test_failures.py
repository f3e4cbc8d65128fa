"""Strategies that go wrong, with real kernels and real kills: the others finish, nothing half-done looks done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_project import PACKAGE, write_notebook


def wait_for(path: Path, seconds: float = 60) -> str:
    """Text of a file as soon as it is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise TimeoutError(f"{path} did not appear")


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_failure_stops_no_other_and_says_where_it_was(project):
    for name in ("plain", "killed", "raises", "unrecorded"):
        project.add(name)
    run = project.call("run")
    assert run.code == 1, run.err
    assert sorted(project.executions()) == ["killed", "plain", "raises", "unrecorded"]

    assert project.status("plain")["state"] == "done"
    record = json.loads((project.folder("plain") / "record.json").read_text())
    assert record["measurements"]["quality.accuracy"]["value"] == 1.5
    assert record["peak_memory_bytes"]["value"] > 1e7
    assert record["key"] and record["duration_seconds"] > 0 and record["provenance"]["finished"]
    assert {file.name for file in project.folder("plain").iterdir()} == {
        ".lock", "notebook.ipynb", "record.json", "status.json",
    }  # fmt: skip
    executed = (project.folder("plain") / "notebook.ipynb").read_text()
    assert str(project.root) not in executed
    assert "<caption>Parameters</caption>" in executed and "<caption>Provenance</caption>" in executed

    killed = project.status("killed")
    assert killed["state"] == "crashed"
    assert killed["cause"] == "the kernel was killed by signal 9, perhaps out of memory"
    assert killed["cell"]["id"] == "body" and "os.kill" in killed["cell"]["source"]
    raised = project.status("raises")
    assert raised["state"] == "failed" and raised["cell"]["id"] == "body"
    assert raised["cause"].startswith("ZeroDivisionError: on ") and "\x1b" not in "".join(raised["last_lines"])
    assert "ZeroDivisionError" in raised["last_lines"][-1]
    assert "without qlib.record" in project.status("unrecorded")["cause"]
    for name in ("killed", "raises", "unrecorded"):
        assert not (project.folder(name) / "record.json").exists() and not (project.folder(name) / "work").exists()
        assert (project.folder(name) / "failed.ipynb").exists()

    listed = project.call("list").out.splitlines()
    assert {line.split()[0]: line.split()[2] for line in listed[1:]} == {
        "plain": "done", "killed": "crashed", "raises": "failed", "unrecorded": "failed",
    }  # fmt: skip

    (project.root / "healed").touch()
    (project.root / "params" / "raises.yaml").unlink()
    (project.root / "params" / "unrecorded.yaml").unlink()
    assert project.call("run").code == 0
    assert project.executions() == ["killed"]
    assert project.status("killed")["state"] == "done"
    assert not (project.folder("killed") / "failed.ipynb").exists()


def test_over_the_limit(project):
    file = project.add("slow")
    run = project.call("run", str(file), "--limit", "6")
    assert run.code == 1 and "longer than its limit of 6 s" in run.err
    assert project.status("slow")["state"] == "timeout"
    pid = project.root / "kernel.pid"
    assert not pid.exists() or not is_alive(int(pid.read_text()))


def test_killed_runner_leaves_no_strategy_done_and_no_kernel(project):
    project.add("slow")
    runner = project.start("run")
    kernel = int(wait_for(project.root / "kernel.pid"))
    assert project.call("list").out.split("\n")[1].split()[2] == "running"
    second = project.call("run")
    assert second.code == 1 and "is being run by another process" in second.err
    runner.kill()
    runner.communicate()
    assert "crashed" in project.call("list").out
    assert "the runner was killed" in project.call("list", "--why").out
    end = time.monotonic() + 20
    while is_alive(kernel) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_alive(kernel)

    (project.root / "healed").touch()
    assert project.call("run").code == 0
    assert project.status("slow")["state"] == "done"
    assert not (project.folder("slow") / "work").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(project, sent):
    project.add("slow")
    runner = project.start("run")
    kernel = int(wait_for(project.root / "kernel.pid"))
    runner.send_signal(sent)
    _, err = runner.communicate(timeout=60)
    assert runner.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert project.status("slow")["state"] == "interrupted"
    assert not is_alive(kernel) and not (project.folder("slow") / "work").exists()


def test_failing_rerun_keeps_the_record(project):
    project.add("plain")
    assert project.call("run").code == 0
    before = (project.folder("plain") / "record.json").read_bytes()
    write_notebook(project.root / "notebooks" / "plain.ipynb", "raise ValueError('now it fails')")
    assert project.call("run").code == 1
    assert (project.folder("plain") / "record.json").read_bytes() == before
    assert project.status("plain")["state"] == "failed"
    assert project.call("list").out.splitlines()[1].split()[2] == "failed"


@pytest.fixture
def small_disk(project):
    """The runs folder on a disk of 4 MB."""
    project.runs.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(project.runs)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here (needs root): {mounted.stderr.strip()}")
    yield project
    subprocess.run(["umount", "-l", str(project.runs)], check=True)


def test_full_disk(small_disk):
    project = small_disk
    for name in ("full", "plain"):
        project.add(name)
    run = project.call("run")
    assert run.code == 1 and "disk full" in run.err, run.err
    assert project.status("full")["state"] == "failed" and project.status("full")["cause"] == "disk full"
    assert not (project.folder("full") / "record.json").exists() and not (project.folder("full") / "work").exists()
    assert project.status("plain")["state"] == "done"


def test_disk_that_is_full_before_the_start(small_disk):
    project = small_disk
    project.add("plain")
    filler = project.runs / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    run = project.call("run")
    assert run.code == 1 and "disk full" in run.err and "Traceback" not in run.err, run.err
    filler.unlink()
    assert project.call("run").code == 0


def papermill(project, *arguments: str) -> subprocess.CompletedProcess:
    """Plain papermill, without the runner."""
    command = [sys.executable, "-m", "papermill", "notebooks/plain.ipynb", "out.ipynb", "-k", "python3", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)


def test_plain_papermill_refuses_a_misspelt_parameter(project):
    run = papermill(project, "-p", "sed", "3")
    assert run.returncode != 0 and "'sed' is unknown (did you mean 'seed'?)" in run.stderr
    assert not (project.root / "plain").exists()


def test_plain_papermill_with_a_strategy_file(project):
    file = project.add("alone", seed=3)
    run = papermill(project, "-f", str(file.relative_to(project.root)))
    assert run.returncode == 0, run.stderr
    result = json.loads((project.root / "alone" / "result.json").read_text())
    assert result["params"]["seed"] == 3 and "key" not in result


def test_a_kernel_that_does_not_come_up_is_started_again(project):
    project.add("plain")
    (project.root / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'ipykernel_launcher' in ' '.join(sys.orig_argv) and not os.path.exists('tried'):\n"
        "    open('tried', 'w').close()\n"
        "    os._exit(1)\n"
    )
    project.environment["PYTHONPATH"] += os.pathsep + str(project.root)
    run = project.call("run")
    assert (project.root / "tried").exists() and run.code == 0, run.err
    assert project.executions() == ["plain"]
