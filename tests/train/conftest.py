"""Text that a tiny model learns from within a second, and a fine-tuning pass over it."""

import pytest

WORDS = "for one in range(10):\n    print(one + {}, {})\n\nclass Point:\n    def add(self, index):\n        return 0\n"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(500):
        (folder / f"{number}.py").write_text(WORDS.format(number, number) * 5)
    return str(folder)


@pytest.fixture
def step(text):
    return {"pass": "finetune", "tokens": 8192, "length": 32, "batch_tokens": 512, "peak_lr": 0.01, "text": text}
