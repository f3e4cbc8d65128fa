"""Controls, starting points and ablations are found from recipes, whatever the strategies are called."""

from types import SimpleNamespace

import pytest

from qlib.recipe import pass_names
from qlib.report.book import collect
from qlib.report.relations import control_of, is_control, kinds, left_out, parts_of, untrained_of, wholes


def name_of(entry):
    return entry and entry.name


@pytest.mark.parametrize(
    "name, control, untrained",
    [
        ("baseline", None, None),
        ("narrow", None, None),
        ("narrow-tuned", "only-tuned", "narrow"),  # its loss differs, nothing else does
        ("only-tuned", None, None),
        ("rounded-tuned", "only-tuned", None),
        ("all", None, "all-but-last-training"),  # nobody ran it without any training
        ("all-but-last-training", "only-tuned", None),
    ],
)
def test_control_and_starting_point(trained, name, control, untrained):
    entry = trained.get(name)
    assert name_of(control_of(trained, entry)) == control
    assert name_of(untrained_of(trained, entry)) == untrained
    assert is_control(entry) == (name == "only-tuned")


def test_no_training_at_all_comes_before_the_last_one_left_out(trained, tmp_path, make):
    recipe = [step for step in trained.get("all").params["recipe"] if step["pass"] != "finetune"]
    make.strategy(tmp_path / "reference-2" / "cpu", "bare", "combined", recipe, 3.2, 5)
    book = collect(tmp_path, tmp_path / "none")
    assert name_of(untrained_of(book, book.get("all"))) == "bare"


def test_another_seed_or_model_is_no_control(trained, tmp_path, make):
    recipe = trained.get("narrow-tuned").params["recipe"]
    make.strategy(tmp_path / "other" / "cpu", "elsewhere", "finetuning", recipe, 2.4, 8, model="other")
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "reseeded", "finetuning", recipe, 2.4, 8)
    record = (folder / "reseeded" / "record.json").read_text().replace('"seed": 7, "recipe"', '"seed": 8, "recipe"')
    (folder / "reseeded" / "record.json").write_text(record)
    book = collect(tmp_path, tmp_path / "none")
    assert book.get("reseeded").params["seed"] == 8
    assert control_of(book, book.get("elsewhere")) is None and control_of(book, book.get("reseeded")) is None


def test_parts_leave_out_passes_in_order(trained):
    whole = trained.get("all")
    found = {part.name: left_out(whole, part) for part in parts_of(trained, whole)}
    assert found == {
        "all-but-first-training": ["finetune (1 of 2)"],
        "all-but-last-training": ["finetune (2 of 2)"],
        "narrow-tuned": ["gptq", "finetune (2 of 2)"],
        "narrow": ["finetune (1 of 2)", "gptq", "finetune (2 of 2)"],
    }
    assert [e.name for e in wholes(trained, trained.of(family="combined"))] == ["all"]
    assert left_out(whole, trained.get("baseline")) is None and left_out(whole, whole) is None


def test_kinds_are_the_folders_of_the_passes():
    pruning = next(name for name, module in pass_names().items() if ".prune." in module)
    recipe = [{"pass": pruning}, {"pass": "rtn"}, {"pass": "finetune"}, {"pass": "of another version"}]
    assert kinds(SimpleNamespace(params={"recipe": recipe})) == {"prune", "quantize", "train"}


def test_a_record_of_an_earlier_version_lacks_options_that_came_later(tmp_path, make):
    """Its control is found all the same: what it did not know is what it did."""
    folder = tmp_path / "reference-2" / "cpu"
    short = {"pass": "finetune", "tokens": 1000, "peak_lr": 1e-3}
    whole = short | {"train": "full", "patience": None, "hidden": 0.0}
    make.strategy(folder, "control", "finetuning", [whole], 6.0, 5)
    make.strategy(folder, "tuned", "finetuning", [{"pass": "rtn", "bits": 3}, short], 6.5, 5)
    make.strategy(folder, "other", "finetuning", [{"pass": "rtn", "bits": 3}, short | {"train": "lora"}], 6.5, 5)
    book = collect(tmp_path, tmp_path / "none")
    assert name_of(control_of(book, book.get("tuned"))) == "control"
    assert control_of(book, book.get("other")) is None
