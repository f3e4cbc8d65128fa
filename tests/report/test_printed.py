"""What a cell printed is folded on its page, and nothing of it is lost."""

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from qlib.report.printed import SHORT, fold_kept, fold_printed


def stream(name: str, text: str) -> nbformat.NotebookNode:
    return new_output("stream", name=name, text=text)


def folded(*outputs: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    notebook = new_notebook(cells=[new_code_cell("run()", outputs=list(outputs))])
    return fold_printed(notebook, {})[0].cells[0].outputs


def test_warnings_are_folded_and_short_output_stays():
    table = new_output("display_data", {"text/html": "<table></table>"})
    outputs = folded(
        stream("stdout", "size: 3\n"), stream("stderr", "old <API>\n"), stream("stderr", "\x1b[31mred\n"), table
    )
    assert [output.output_type for output in outputs] == ["stream", "display_data", "display_data"]
    html = outputs[1].data["text/html"]
    assert "2 lines" in html and "old &lt;API&gt;" in html and "ansi-red" in html and outputs[2] == table


def test_long_output_is_folded_as_one():
    rows = "".join(f"layer {index}\n" for index in range(SHORT))
    assert [one.output_type for one in folded(stream("stdout", rows))] == ["stream"]
    (one,) = folded(stream("stdout", rows), stream("stderr", "warning\n"), stream("stdout", "last\n"))
    assert f"{SHORT + 2} lines" in one.data["text/html"] and "layer 7\n" in one.data["text/html"]


def test_a_bar_is_shown_as_it_stood_at_last():
    (one,) = folded(stream("stderr", "  0%\r 50%\r100% done\r\nnext\r"))
    html = one.data["text/html"]
    assert "100% done\nnext<" in html and "50%" not in html and "2 lines" in html
    assert folded(stream("stderr", "\n \r\n")) == []


def test_a_failed_cell_stays_open():
    error = new_output("error", ename="ValueError", evalue="no", traceback=["no"])
    outputs = [stream("stderr", "why\n"), error]
    assert folded(*outputs) == outputs


def test_a_kept_page_is_folded_as_well():
    box = '<pre class="out err" tabindex="0">{}\n</pre>\n'
    page = f'<p>a</p>\n{box.format("1/3 &lt;b&gt;")}{box.format("2/3")}\n<p>b</p>{box.format("late")}<pre class="out">x</pre>'
    html = fold_kept(page)
    assert "out err" not in html and html.count("<details") == 2 == html.count("</details>")
    assert "2 lines" in html and '>1/3 &lt;b&gt;\n2/3</pre>' in html and "1 line<" in html
    assert html.startswith("<p>a</p>\n<details") and html.endswith('<pre class="out">x</pre>') and fold_kept(html) == html
