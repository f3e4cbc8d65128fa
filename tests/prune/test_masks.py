"""Masks against brute force, Wanda's score against a direct computation, and what must be refused."""

import pytest
import torch
from torch import nn

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune import magnitude, wanda
from qlib.prune.mask import PrunedWeight, mask_of, put_pruned
from qlib.prune.select import choose_mask
from qlib.models.families import family_of
from qlib.walk import feed_groups, walk

CALIBRATION = Calibration(samples=16, length=64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(scores, count):
    """Which of a list of scores stay, by sorting (score, place) pairs."""
    gone = {place for _, place in sorted((score, place) for place, score in enumerate(scores))[:count]}
    return [place not in gone for place in range(len(scores))]


@pytest.mark.parametrize("sparsity", (0.0, 0.1, 0.5, 0.87))
def test_masks_equal_brute_force_and_count_exactly(sparsity):
    scores = (random(6, 20).abs() * 4).round()  # rounded: many ties
    whole = choose_mask(scores, sparsity)
    assert whole.flatten().tolist() == brute_force(scores.flatten().tolist(), round(sparsity * 120))
    rows = choose_mask(scores, sparsity, by_row=True)
    assert rows.tolist() == [brute_force(row, round(sparsity * 20)) for row in scores.tolist()]
    assert (~whole).sum() == round(sparsity * 120) and ((~rows).sum(1) == round(sparsity * 20)).all()


@pytest.mark.parametrize("pattern", ("1:2", "2:4", "3:4", "4:8", "4:4"))
def test_a_pattern_holds_in_every_group(pattern):
    kept, of = map(int, pattern.split(":"))
    scores = (random(6, 24).abs() * 4).round()
    mask = choose_mask(scores, 1 - kept / of, pattern).view(-1, of)
    assert (mask.sum(1) == kept).all()
    assert mask.tolist() == [brute_force(group, of - kept) for group in scores.view(-1, of).tolist()]


@pytest.mark.parametrize("choice", ({}, {"by_row": True}, {"pattern": "2:4"}))
def test_what_was_pruned_stays_pruned_and_counts(choice):
    scores, first = random(8, 32).abs(), torch.rand(8, 32, generator=torch.Generator().manual_seed(3)) > 0.2
    mask = choose_mask(scores, 0.5, mask=first, **choice)
    assert not (mask & ~first).any()
    if not choice:
        assert (~mask).sum() == 128  # the earlier zeros are among them
    rows = mask.sum(1)
    if choice.get("by_row"):
        assert torch.equal(rows, torch.minimum(first.sum(1), torch.tensor(16)))
    if choice.get("pattern"):
        assert torch.equal(mask.view(-1, 4).sum(1), first.view(-1, 4).sum(1).clamp(max=2))
    sparse = torch.zeros(8, 32, dtype=torch.bool)
    sparse[:, 0] = True
    assert torch.equal(choose_mask(scores, 0.5, mask=sparse, **choice), sparse)  # already fewer than asked for


def test_wanda_is_weight_times_norm_over_all_batches():
    weight, batches = random(5, 8), [random(7, 8, seed=i) * (i + 1) for i in range(3)]
    statistic = wanda.Statistic(8, wanda.Options())
    for batch in batches:
        statistic.feed(batch.bfloat16())
    norms = [sum(float(row[c]) ** 2 for b in batches for row in b.bfloat16()) ** 0.5 for c in range(8)]
    expected = torch.tensor([[abs(float(weight[o, c])) * norms[c] for c in range(8)] for o in range(5)])
    torch.testing.assert_close(wanda.scores(weight, statistic.norms), expected)
    pruned = wanda.solve(weight, wanda.Options(), statistic=statistic)
    assert pruned.mask.tolist() == [brute_force(row, 4) for row in expected.tolist()]
    assert torch.equal(pruned.dequantize(), torch.where(pruned.mask, weight, 0.0))


def test_magnitude_compares_the_whole_linear():
    weight = torch.cat([torch.full((1, 8), 0.1), torch.full((1, 8), -5.0)])
    assert magnitude.solve(weight, magnitude.Options()).mask.tolist() == [[False] * 8, [True] * 8]


def test_wanda_compares_what_it_is_told_to():
    weight, statistic = random(6, 20), wanda.Statistic(20, wanda.Options())
    statistic.feed(random(30, 20, seed=1))
    whole = wanda.solve(weight, wanda.Options(compare="linear"), statistic=statistic).mask
    scores = wanda.scores(weight, statistic.norms)
    assert whole.flatten().tolist() == brute_force(scores.flatten().tolist(), 60)
    rows = wanda.solve(weight, wanda.Options(), statistic=statistic).mask
    assert ((~rows).sum(1) == 10).all() and not torch.equal(rows, whole)


@pytest.mark.parametrize("name", ("magnitude", "wanda"))
def test_a_later_pass_keeps_the_mask_of_an_earlier_one(model_folder, name):
    subject = compress(load(str(model_folder())), [{"pass": "magnitude", "sparsity": 0.25}])
    first = {n: mask_of(m).clone() for n, m in linears_of(subject.model, blocks_of(subject.model)[0]).items()}
    again = compress(subject, [{"pass": name}], CALIBRATION)
    for path, linear in linears_of(again.model, blocks_of(again.model)[0]).items():
        mask = mask_of(linear)
        assert not (mask & ~first[path]).any() and 0.45 < mask.float().mean() <= 0.5
    assert {round(layer["kept"], 1) for layer in again.details["layers"]} == {0.5}
    assert again.details["shape_format"] == "bf16"  # zeros in a dense matrix are no format of their own


@pytest.mark.parametrize(
    "step, words",
    [
        ({"sparsity": 1.0}, "recipe[0].sparsity: 1.0 is not allowed; allowed: at least 0, less than 1"),
        ({"sparsity": -0.1}, "recipe[0].sparsity: -0.1 is not allowed"),
        ({"pattern": "4:2"}, "recipe[0].pattern: '4:2' is not allowed; allowed: N:M"),
        ({"pattern": "0:4"}, "recipe[0].pattern: '0:4' is not allowed"),
        ({"pattern": "2-4"}, "recipe[0].pattern: '2-4' is not allowed"),
        ({"pattern": "1:4"}, "recipe[0].sparsity: 0.5 contradicts pattern '1:4'; allowed with it: 0.75"),
        ({"pattern": "3:6"}, "recipe[0].pattern: '3:6' does not fit self_attn.q_proj: 6 does not divide"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ("magnitude", "wanda"))
def test_what_cannot_work_is_refused_before_anything_changes(model_folder, name, step, words):
    subject = load(str(model_folder()))
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        compress(subject, [{"pass": name} | step], CALIBRATION)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in subject.model.state_dict().items())


def test_float_weights_are_needed(model_folder):
    recipe = [{"pass": "rtn", "group_size": 32}, {"pass": "magnitude"}]
    with pytest.raises(UserError, match="recipe.1.: pass 'magnitude' must come before the weights are put on a grid"):
        compress(load(str(model_folder())), recipe)


def test_a_mask_that_does_not_fit_is_refused():
    weight, mask = random(4, 8), torch.ones(4, 6, dtype=torch.bool)
    for attempt in (
        lambda: PrunedWeight(weight, mask),
        lambda: magnitude.solve(weight, magnitude.Options(), mask=mask),
        lambda: put_pruned(nn.Linear(6, 4, bias=False), PrunedWeight(weight, weight != 0)),
    ):
        with pytest.raises(UserError, match=r"^mask: its shape \[4, \d\] does not fit the weight's \[4, \d\]$"):
            attempt()


def test_wanda_loses_less_of_every_output_of_the_reference_model_than_magnitude():
    """Where both compare the same weights with each other. Magnitude within the whole linear may beat Wanda by row."""
    from qlib.data.calibration import read_calibration
    from qlib.prune.structures import Gram, output_error

    subject, worse = load("reference-2"), []
    ids = read_calibration(subject.tokenizer, Calibration(samples=16), 0)

    for visit in walk(subject.model, ids):
        for names in family_of(subject.config).groups:
            width = visit.block.get_submodule(names[0]).in_features
            gram, statistic = Gram(width), wanda.Statistic(width, wanda.Options())
            feed_groups(visit.block, visit.inputs, {names: lambda inputs: (gram.feed(inputs), statistic.feed(inputs))})
            for name in names:
                weight, everything = visit.block.get_submodule(name).weight.detach(), torch.arange(width)
                scored = (wanda.scores(weight, statistic.norms), weight.abs().float())
                for by_row in (False, True):
                    masks = [choose_mask(s, 0.5, by_row=by_row) for s in scored]
                    ours, theirs = (output_error(weight, gram.matrix, everything, weight * mask) for mask in masks)
                    worse.extend([(visit.index, name, by_row, ours, theirs)] if ours >= theirs else [])
    assert not worse
