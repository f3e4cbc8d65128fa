"""The command of the README on a checkpoint larger than the memory it is given, killed twice: the same bytes in the end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from large import memory_limit, write_model
from test_resume import hashes

from qlib import cli

ROOT = Path(__file__).parents[2]
MB = 10**6
LARGE = dict(hidden_size=1536, intermediate_size=3072, num_attention_heads=24, num_key_value_heads=4, vocab_size=40960)
WIDE = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, vocab_size=240_000)
TINY = dict(hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, vocab_size=300)
TEXT = ["calibration.samples=8", "calibration.length=64"]


def command(model, output, *more):
    """`qlib stream gptq-int4` with a little text beside the model."""
    text = model.parent / "text"
    if not text.exists():
        text.mkdir()
        for number in range(40):
            lines = (f"def add_{number}_{line}(first, second):\n    return first + {number * line}\n" for line in range(60))
            (text / f"{number}.txt").write_text("".join(lines))
    changes = [word for one in [f"calibration.text={text}", *TEXT] for word in ("-p", one)]
    told = ["stream", "gptq-int4", "--model", str(model), "--output", str(output), *changes, *more]
    return [sys.executable, "-m", "qlib", *told]


def run(words, output, kill_at=None):
    """Run a command, killed once so many parts are finished; returns what it printed, or how many parts there are."""
    threads = str(torch.get_num_threads())  # what is solved depends on it in the last bit
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while kill_at and child.poll() is None and parts(output) < kill_at:
        time.sleep(0.02)
    if kill_at:
        child.kill()
    out, err = child.communicate()
    assert child.returncode == (-9 if kill_at else 0), f"exit code {child.returncode}: {err[-1000:]}"
    return parts(output) if kill_at else out


def parts(output):
    """Number of finished parts; the manifest is replaced whole."""
    file = output / "stream.json"
    return len(json.loads(file.read_text())["shards"]) if file.is_file() else 0


def peak(printed):
    """Most anonymous memory that the command says it took, in bytes."""
    return int(re.search(r"at most ([\d,]+) MB of memory", printed)[1].replace(",", "")) * MB


def needs_of_a_block(hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, **_):
    """Bytes that GPTQ takes for one block, beside the text: its weights in bf16, a Hessian in fp32 for every input, three
    more of the largest one while it is factorized, and four times the weights that are solved together in fp32."""
    shared = hidden_size // num_attention_heads * num_key_value_heads
    groups = [
        (hidden_size, hidden_size + 2 * shared), (hidden_size, hidden_size),
        (hidden_size, 2 * intermediate_size), (intermediate_size, hidden_size),
    ]  # fmt: skip
    weights, hessians = sum(i * o for i, o in groups), sum(i * i for i, _ in groups)
    return 2 * weights + 4 * hessians + max(4 * 3 * i * i + 4 * 4 * i * o for i, o in groups)


def killed(model, output, limit, kills, *more):
    """Run under a limit, killed once some parts are finished and then to the end; returns what the last run printed."""
    words = command(model, output, *more)
    with memory_limit(limit) as (prefix, how):
        if prefix is None:
            pytest.skip(how)
        died = [run([*prefix, *words], output, kill) for kill in kills]
        printed = run([*prefix, *words], output)
    assert died == sorted(set(died)) and died[-1] < parts(output)
    return printed


def test_a_checkpoint_larger_than_the_memory(tokenizer, tmp_path):
    model, limit = tmp_path / "model", 450 * MB
    assert write_model(model, tokenizer, 4, **WIDE) > 1.1 * limit
    killed(model, tmp_path / "killed", limit, [3], "--format", "gptq")
    assert cli.main(command(model, tmp_path / "whole", "--format", "gptq")[3:]) == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_a_deep_checkpoint_larger_than_the_memory_killed_twice(tokenizer, tmp_path):
    write_model(tmp_path / "tiny", tokenizer, 1, **TINY)
    interpreter = peak(run(command(tmp_path / "tiny", tmp_path / "tiny-4"), tmp_path / "tiny-4"))
    block = needs_of_a_block(**LARGE)
    limit = interpreter + block + 100 * MB
    deep = write_model(tmp_path / "deep", tokenizer, 24, **LARGE)
    assert deep > 1.15e9 and limit < 0.7 * deep
    printed = killed(tmp_path / "deep", tmp_path / "killed", limit, [6, 15])
    whole = run(command(tmp_path / "deep", tmp_path / "whole"), tmp_path / "whole")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    write_model(tmp_path / "shallow", tokenizer, 6, tmp_path / "deep", **LARGE)
    shallow = peak(run(command(tmp_path / "shallow", tmp_path / "shallow-4"), tmp_path / "shallow-4"))
    found = f"interpreter {interpreter}, a block {block}, peaks {shallow} {peak(whole)} {peak(printed)}"
    assert max(peak(whole), peak(printed)) < shallow + 25 * MB, found
    assert max(peak(whole), peak(printed)) < interpreter + block + 25 * MB, found
