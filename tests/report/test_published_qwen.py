"""Published figures of 72B models: the floors beside them follow from bytes, and nobody is below one."""

import pytest

from qlib.models.shapes import find_shape
from qlib.report.article import QWEN_MMLU
from qlib.report.published_qwen import A100_BANDWIDTH, PUBLISHED, least_token_ms, published_table, quality_table


@pytest.mark.parametrize("model", ["qwen-72b", "qwen2.5-72b"])
def test_the_floor_of_bf16_is_all_weights_but_the_embedding(model):
    shape = find_shape(model)
    read = 2 * (shape.parameters - shape.vocab * shape.hidden)
    assert least_token_ms(model, "bf16", A100_BANDWIDTH) == pytest.approx(1e3 * read / 2.039e12)
    assert least_token_ms(model, "bf16", 2 * A100_BANDWIDTH) == pytest.approx(1e3 * read / 4.078e12)


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: f"{one.model} {one.precision}")
def test_no_published_speed_is_above_what_the_memory_allows(one):
    assert one.tokens < 1e3 / least_token_ms(one.shape, one.format, A100_BANDWIDTH)
    assert one.gpus * 80 >= one.gigabytes and one.source and one.setting


def test_fewer_bits_have_a_lower_floor_and_the_article_quotes_the_same_figures():
    floors = [least_token_ms("qwen-72b", one.format, 1) for one in PUBLISHED[:3]]
    assert floors == sorted(floors, reverse=True)
    assert [dict(one.quality)["MMLU"] for one in PUBLISHED[:3]] == list(QWEN_MMLU.values())


def test_tables_name_their_sources():
    html = published_table()._repr_html_()
    assert "QwenLM/Qwen3" in html and "11.32" in html and "2,039 GB/s" in html
    assert "80.1" in quality_table()._repr_html_() and "without intervals" in quality_table().caption
