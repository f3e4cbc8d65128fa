"""The walk against a plain forward pass with hooks."""

import torch

from qlib.models.families import blocks_of, family_of
from qlib.plain_attention import PlainAttention
from qlib.walk import feed_groups, walk


def record_inputs(model, ids):
    """Inputs of each group's first linear in an ordinary forward pass: {(block, name): [tokens, in]}."""
    seen, handles = {}, []
    for index, block in enumerate(blocks_of(model)):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):

            def hook(module, args, key=(index, name)):
                seen.setdefault(key, []).append(args[0].flatten(0, -2).clone())

            handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in ids:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


def feed_all(model, ids, change=None):
    """Inputs `{(block, name): [tokens, in]}` as the walk feeds them."""
    fed = {}
    for visit in walk(model, ids):
        seen = {names: fed.setdefault((visit.index, names[0]), []).append for names in family_of(model.config).groups}
        feed_groups(visit.block, visit.inputs, seen)
        if change:
            change(visit)
    return {key: torch.cat(parts) for key, parts in fed.items()}


def some_ids(batches=2):
    return [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(batches)]


def test_every_group_is_fed_what_reaches_it(tiny_model):
    for kind in ("qwen2", "qwen3", "llama", "mistral"):
        model, ids = tiny_model(kind), some_ids()
        with PlainAttention():  # as in the walk, so that not even the rounding differs
            expected = record_inputs(model, ids)
        fed = feed_all(model, ids)
        assert set(fed) == set(expected)
        for key, inputs in fed.items():
            torch.testing.assert_close(inputs, expected[key], rtol=0, atol=0)


def halve_the_first(visit):
    if visit.index == 0:
        for linear in (m for m in visit.block.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.data.mul_(0.5)


def test_the_next_block_sees_the_output_of_the_compressed_one(tiny_model):
    model, ids = tiny_model(), some_ids(1)
    fed = feed_all(model, ids, halve_the_first)
    with PlainAttention():
        after = record_inputs(model, ids)  # the model now holds the halved weights
    torch.testing.assert_close(fed[1, "self_attn.q_proj"], after[1, "self_attn.q_proj"], rtol=0, atol=0)


def test_targets_are_what_the_uncompressed_model_hands_on(tiny_model):
    model, ids, seen = tiny_model(), some_ids(), {}
    with torch.no_grad(), PlainAttention():
        states = [model(input_ids=batch, output_hidden_states=True).hidden_states for batch in ids]
    for visit in walk(model, ids, targets=True):
        seen[visit.index] = visit.targets
        halve_the_first(visit)
    for batch in range(2):
        torch.testing.assert_close(seen[0][batch], states[batch][1], rtol=0, atol=0)
        normed = model.model.norm(seen[1][batch])  # the last hidden state is given behind the norm
        torch.testing.assert_close(normed, states[batch][2], rtol=0, atol=0)


def test_what_a_feed_returns_does_not_replace_the_input(tiny_model):
    model = tiny_model()
    for visit in walk(model, some_ids(1)):
        groups = family_of(model.config).groups
        feed_groups(visit.block, visit.inputs, {names: lambda inputs: [inputs, None] for names in groups})


def test_no_forward_runs_without_data(tiny_model):
    model = tiny_model()
    model.forward = None  # calling it would fail
    visits = list(walk(model, []))
    assert [(visit.path, visit.inputs, visit.targets) for visit in visits] == [
        ("model.layers.0", [], None),
        ("model.layers.1", [], None),
    ]
