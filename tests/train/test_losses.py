"""Hidden states as a target, and early stopping."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.load import load
from qlib.train import finetune
from qlib.train.early import Best
from qlib.train.losses import distillation_loss, divergence_from, hidden_loss


def test_the_distance_of_hidden_states():
    ours, theirs = ([torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed + at)) for at in range(3)] for seed in (0, 9))
    exact = torch.stack([((a - b).double().norm() / b.double().norm()) ** 2 for a, b in zip(ours, theirs)]).mean()
    assert hidden_loss(ours, theirs).item() == pytest.approx(exact.item(), rel=1e-5)
    last = ((ours[1] - theirs[2]).norm() / theirs[2].norm()) ** 2
    assert hidden_loss(ours[:2], theirs).item() == pytest.approx(last.item(), rel=1e-5), "blocks are gone: the last alone"


def test_both_terms_count(tiny_model):
    model, teacher, ids = tiny_model(seed=1).float(), tiny_model().float(), torch.arange(32).view(2, 16)
    plain, both = (divergence_from(teacher, weight)(model, ids).item() for weight in (0.0, 0.5))
    found, wanted = (one(input_ids=ids, output_hidden_states=True) for one in (model, teacher))
    assert plain == pytest.approx(distillation_loss(found.logits, wanted.logits).item())
    more = hidden_loss(found.hidden_states[1:], wanted.hidden_states[1:]).item()
    assert both == pytest.approx(plain + 0.5 * more) and more > 0


def test_the_best_is_kept():
    model = torch.nn.Linear(2, 1, bias=False)
    best, stops = Best(model, 1), []
    for value, loss in ((1.0, 3.0), (2.0, 2.0), (3.0, 2.5), (4.0, 2.6)):
        model.weight.data.fill_(value)
        stops.append(best.tell(loss))
    assert stops == [False, False, False, True]
    best.restore()
    assert (model.weight == 2).all() and best.loss == 2.0
    never = Best(model, None)
    assert not any(never.tell(loss) for loss in (1.0, 2.0, 3.0, 4.0))
    never.restore()
    assert (model.weight == 2).all()


def test_training_stops_early_and_keeps_the_best(model_folder, step, monkeypatch):
    """A rate that is far too high: the loss falls and then rises."""
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 9.9])
    monkeypatch.setattr(finetune, "held_out_loss", lambda model, ids: next(losses))
    subject = compress(load(str(model_folder())), [step | {"patience": 2}])
    training = subject.details["training"][0]
    assert [loss for _, loss in training["development"]] == [5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 9.9]
    assert training["steps"] == 5 and training["tokens"] == 5 * 512, "5 of 16 steps were taken"


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"hidden": 1.0}, "hidden: 1.0 is not allowed with loss cross_entropy"),
        ({"hidden": -1.0, "loss": "distillation"}, "hidden: -1.0"),
        ({"patience": -1}, "patience: -1 is not allowed; allowed: at least 0, or null"),
    ],
)
def test_what_cannot_be(model_folder, step, wrong, words):
    with pytest.raises(UserError, match=f"recipe.0..{words}"):
        compress(load(str(model_folder())), [step | wrong])
