"""The walk against a plain forward pass with hooks."""

import torch

from qlib.models.families import blocks_of
from qlib.walk import walk


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


def test_every_group_is_fed_what_reaches_it(tiny_model):
    for kind in ("qwen2", "qwen3", "llama", "mistral"):
        model = tiny_model(kind)
        ids = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
        expected, fed = record_inputs(model, ids), {}

        def open_group(index, block, names):
            return lambda inputs: fed.setdefault((index, names[0]), []).append(inputs.clone())

        walk(model, ids, open_group, lambda index, block, names: None)
        assert set(fed) == set(expected)
        for key, parts in fed.items():
            torch.testing.assert_close(torch.cat(parts), expected[key], rtol=0, atol=0)


def test_the_next_block_sees_the_output_of_the_compressed_one(tiny_model):
    model, fed = tiny_model(), {}
    ids = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))]

    def open_group(index, block, names):
        return lambda inputs: fed.setdefault((index, names[0]), []).append(inputs.clone())

    def close_group(index, block, names):
        if index == 0:
            for name in names:
                block.get_submodule(name).weight.data.mul_(0.5)

    walk(model, ids, open_group, close_group)
    after = record_inputs(model, ids)  # the model now holds the halved weights
    torch.testing.assert_close(fed[1, "self_attn.q_proj"][0], after[1, "self_attn.q_proj"], rtol=0, atol=0)


def test_what_a_feed_returns_does_not_replace_the_input(tiny_model):
    model = tiny_model()
    ids = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))]
    walk(model, ids, lambda index, block, names: lambda inputs: [inputs, None], lambda index, block, names: None)


def test_no_forward_runs_without_data(tiny_model):
    model, visited = tiny_model(), []
    model.forward = None  # calling it would fail
    walk(model, [], lambda index, block, names: None, lambda index, block, names: visited.append((index, names[0])))
    assert visited == [(i, n) for i in range(2) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]
