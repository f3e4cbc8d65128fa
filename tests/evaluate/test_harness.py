"""lm-evaluation-harness and our scorer give the same local items the same accuracy."""

import json

import numpy as np
import pytest
import torch

from qlib.data.tokenizer import END
from qlib.errors import UserError
from qlib.evaluate.harness import run_tasks
from qlib.evaluate.items import Item
from qlib.evaluate.precision import in_float32
from qlib.evaluate.quality import score_items
from qlib.models.load import load

WORDS = "add point index return class pass self first second print".split()
TASK = """task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: {metric}
metadata:
  version: 1.0
"""


@pytest.fixture
def questions():
    generator = np.random.default_rng(0)

    def words(n):
        return "".join(f" {word}" for word in generator.choice(WORDS, n))

    return [{"context": END + words(12), "choices": [words(5) for _ in range(4)]} for _ in range(40)]


def own_scores(subject, questions):
    def ids(text):
        return tuple(subject.tokenizer(text, add_special_tokens=False)["input_ids"])

    items = [Item(0, 0, ids(q["context"])[1:], tuple(map(ids, q["choices"]))) for q in questions]
    with in_float32(subject.model):
        return score_items(lambda x, keep: subject.model(input_ids=x).logits[:, -keep:], items, start=0)


def test_the_same_items_the_same_accuracy(model_folder, tmp_path, questions, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = tmp_path / "local.yaml"
    task.write_text(TASK.format(data=tmp_path / "data.jsonl", metric="acc"))
    subject = load(str(model_folder()))
    state, global_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = run_tasks(subject, [str(task)])["task.local_choice"]
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], global_state)
    inside, alone = own_scores(subject, questions)
    assert found.n == 40 and found.unit == "percent" and found.low < found.value < found.high
    assert found.value == pytest.approx(100 * (inside.argmax(1) == 0).mean())


def test_likelihood_relative_to_the_unconditional_one_too(model_folder, tmp_path, questions, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl", metric="acc_mutual_info"))
    subject = load(str(model_folder()))
    with in_float32(subject.model):
        wrapped = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = simple_evaluate(wrapped, tasks=["local_choice"], task_manager=manager, log_samples=False)["results"]
    inside, alone = own_scores(subject, questions)
    ours = ((inside - alone).argmax(1) == 0).mean()
    assert results["local_choice"]["acc_mutual_info,none"] == pytest.approx(ours)


def test_unknown_tasks_are_refused(model_folder):
    subject = load(str(model_folder()))
    with pytest.raises(UserError, match=r"'arc_eazy' is unknown to lm-evaluation-harness \(did you mean 'arc_easy'\?\)"):
        run_tasks(subject, ["arc_eazy"])
    with pytest.raises(UserError, match="mine.yaml does not exist"):
        run_tasks(subject, ["mine.yaml"])


def test_a_quantized_cache_is_refused_because_the_harness_would_not_read_through_it():
    subject = load("reference")
    subject.model.config.kv_cache = {"bits": 8, "group_size": None}
    with pytest.raises(UserError, match="does not read through the model's quantized kv_cache"):
        run_tasks(subject, ["arc_easy"])
