"""Tiny random models of every supported architecture, made once per session."""

import pytest

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")


@pytest.fixture(scope="session")
def tokenizer():
    from qlib.data.tokenizer import train_tokenizer

    text = "def add(first, second):\n    return first + second\n\nclass Point:\n    pass\n"
    return train_tokenizer([text * 3, "for index in range(10):\n    print(index)\n"], 300)


@pytest.fixture(scope="session")
def tiny_model():
    """Make a random model: ``tiny_model("qwen2", tied=True)``, two layers, hidden 64."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind="qwen2", tied=False, seed=0, **changes):
        settings = dict(
            vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=128, max_position_embeddings=256, tie_word_embeddings=tied,
            bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )  # fmt: skip
        config = AutoConfig.for_model(kind, **(settings | changes))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    return make


@pytest.fixture
def model_folder(tmp_path, tiny_model, tokenizer):
    """Write a tiny model with its tokenizer: ``model_folder("qwen2", shard="20KB")`` -> folder."""

    def make(kind="qwen2", tied=False, shard="5GB", name="model", **changes):
        folder = tmp_path / name
        tiny_model(kind, tied, **changes).save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub on this machine, and a program that streams from it: ``hub.add(id, folder)``, ``hub.run(stream={...})``."""
    import json
    import os
    import subprocess
    import sys
    from pathlib import Path

    from hub_server import Hub

    here, server = Path(__file__).parent, Hub()
    known = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path_factory.mktemp("hub")), "PYTHONPATH": str(here.parent)}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | known
    command = [sys.executable, str(here / "hub_driver.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes) as driver:

        def run(**job):
            driver.stdin.write(json.dumps(job, default=str) + "\n")
            driver.stdin.flush()
            code, text = json.loads(driver.stdout.readline())
            return code, text

        server.run = run
        yield server
        driver.stdin.close()
    server.shutdown()
    server.server_close()
