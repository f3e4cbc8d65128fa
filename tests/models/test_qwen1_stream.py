"""An original Qwen is streamed as it is loaded: converted tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file

from qlib.compress import compress
from qlib.models.load import load
from qlib.models.save import save
from qlib.stream.run import stream

IDS = list(torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3)).split(4))
RECIPE = [{"pass": "awq", "steps": 3}, {"pass": "gptq", "bits": 4, "group_size": None}]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_an_original_is_streamed_as_it_is_loaded(original_folder, tmp_path, dtype):
    model = str(original_folder(dtype=dtype, shard="20KB"))
    stream(model, RECIPE, tmp_path / "streamed", IDS)
    save(compress(load(model), RECIPE, IDS), tmp_path / "saved")
    expected, found = {}, {}
    for folder, tensors in (("saved", expected), ("streamed", found)):
        for file in (tmp_path / folder).glob("*.safetensors"):
            tensors |= load_file(file)
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "saved" / name).read_text(), name


def test_an_original_of_the_hub_is_streamed_as_a_folder_is(original_folder, tmp_path, hub):
    folder, done = original_folder(shard="20KB"), []
    hub.add("owner/original", folder)
    for name, model in (("hub", "owner/original"), ("folder", folder)):
        code, text = hub.run(stream={"model": model, "recipe": RECIPE, "output": tmp_path / name})
        assert code == 0, text
        files = [file for file in (tmp_path / name).rglob("*") if file.is_file() and file.name != "stream.json"]
        done.append({file.name: file.read_bytes() for file in files})
    assert done[0] == done[1] and len(hub.repositories["owner/original"].fetched()) >= 3
