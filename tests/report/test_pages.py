"""From notebooks to pages: prose is current, strategies are stitched in, and a bad page is never written."""

import json
import re
import shutil
import time
from pathlib import Path

import nbformat
import pandas
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from qlib.errors import UserError
from qlib.report import stitch
from qlib.report.book import collect
from qlib.report.check import check_html
from qlib.report.render import convert, render
from qlib.report.structure import finish, scope_ids

GOOD = (
    '<!DOCTYPE html><html lang="en"><head><title>t</title></head><body><h1 id="a">a</h1><a href="#a">a</a>'
    '<img src="data:image/png;base64,x" alt="a cat"><table><caption>c</caption><tr><th scope="col">h</th></tr></table>'
    "<pre>f'{{x}}'</pre>DEFECT</body></html>"
)


@pytest.mark.parametrize(
    "defect, problem",
    [
        ("", None),
        ('<script src="https://cdn.example/x.js"></script>', "fetches"),
        ('<link rel="stylesheet" href="style.css">', "fetches"),
        ('<img src="https://x.example/a.png" alt="a">', "fetches"),
        ("<style>@import 'x.css';</style>", "@import"),
        ("<style>p { background: url(https://x.example/a.png) }</style>", "fetches"),
        ('<p style="background:url(//x.example/a.png)"></p>', "fetches"),
        ('<img src="data:image/png;base64,x">', "alternative text"),
        ('<img src="data:," alt="No description has been provided for this image">', "alternative text"),
        ("<svg></svg>", "role=img"),
        ("<table><caption>c</caption><tr><th>h</th></tr></table>", "without scope"),
        ('<table><tr><th scope="col">h</th></tr></table>', "without caption"),
        ("<h1>again</h1>", "2 h1"),
        ("<p>{{ quality.kl }}</p>", "placeholder left over"),
        ('<p id="a"></p>', "used 2 times"),
        ('<a href="#nowhere">x</a>', "leads nowhere"),
        ('<a href="missing.html">x</a>', "leads to no file"),
        ('<a href="javascript:alert(1)">x</a>', "no page"),
    ],
)
def test_check_html_finds_each_kind_of_defect(tmp_path, defect, problem):
    page = tmp_path / "page.html"
    page.write_text(GOOD.replace("DEFECT", defect))
    problems = check_html(page)
    assert (problems == []) if problem is None else any(problem in line for line in problems), problems


def test_check_html_wants_language_and_title(tmp_path):
    (tmp_path / "page.html").write_text("<html><body><h1>x</h1></body></html>")
    assert check_html(tmp_path / "page.html") == ["<html> without lang", "page without <title>"]


def test_current_prose_keeps_outputs(make):
    done = make.executed("x", [new_output("stream", text="42")])
    source = make.executed("x", [])
    del source.cells[2]  # what papermill injected
    source.cells[0].source = "# x\n\nNew prose."
    source.cells.insert(1, new_markdown_cell("An added paragraph.", id="added"))
    notebook, _ = stitch.current_prose(source)(done, {})
    assert [cell.id for cell in notebook.cells] == ["about", "added", "parameters", "injected", "summary", "hidden"]
    assert notebook.cells[0].source.endswith("New prose.") and notebook.cells[4].outputs[0].text == "42"


def test_current_prose_follows_the_executed_order_if_code_changed(make):
    done, source = make.executed("x", []), make.executed("x", [])
    source.cells = [source.cells[0], new_code_cell("other", id="other")]
    source.cells[0].source = "# x\n\nNew prose."
    notebook, _ = stitch.current_prose(source)(done, {})
    assert [cell.id for cell in notebook.cells] == [cell.id for cell in make.executed("x", []).cells]
    assert "New prose" in notebook.cells[0].source


def test_scoped_ids_take_their_references_along():
    page = '<figure id="fig-a"><path id="p"/><use href="#p" clip-path="url(#p)"/><i data-ref="fig-a"></i></figure>'
    scoped = scope_ids(page + '<a href="#elsewhere">', "gptq")
    assert 'id="fig-gptq-a"' in scoped and 'data-ref="fig-gptq-a"' in scoped
    assert 'href="#gptq-p"' in scoped and "url(#gptq-p)" in scoped and 'href="#elsewhere"' in scoped


def test_a_strategy_is_folded_and_shows_no_empty_figure(project, make):
    from matplotlib.figure import Figure

    from qlib.report.show import data_table, figure_html

    table = data_table(pandas.DataFrame({"a": [1.0]}), "c", "one")._repr_html_()
    shown = [figure_html(Figure(), name, "c", "a", data) for name, data in (
        ("empty", pandas.DataFrame({"a": []})), ("full", pandas.DataFrame({"a": [1.0]})), ("plain", None)
    )]  # fmt: skip
    outputs = [new_output("display_data", {"text/html": html}) for html in (*shown, table)]
    folder = project / "reports" / "runs" / "reference-2" / "cpu" / "rtn-int8"
    nbformat.write(make.executed("rtn-int8", outputs), folder / "notebook.ipynb")
    book = collect(project / "reports" / "runs", project / "reports" / "published")
    cells = [new_markdown_cell("# T"), new_markdown_cell("## S", metadata={"tags": ["strategies"]})]
    page = convert(new_notebook(cells=cells), [stitch.insert_strategies(book)], {}, "x")
    part = page[page.index('id="strategy-rtn-int8"') : page.index('id="strategy-rtn-int4"')]
    assert "fig-rtn-int8-full" in part and "fig-rtn-int8-plain" in part and "fig-rtn-int8-empty" not in part
    assert page.count('<details class="strategy print">') == page.count("<h4 id=") == len(book.strategies)
    assert page.count("<details") == page.count("</details>")
    contents = page[: page.index("<main")]
    assert "#strategies-pruning" in contents and "#strategy-" not in contents


def test_finish_numbers_refers_and_completes():
    page = (
        '<!--contents--><h1>T</h1><h2>One</h2><a href="#fig-b"></a><a href="#one"></a><h2>One</h2>'
        '<span class="number" data-ref="fig-a"></span><span class="number" data-ref="fig-b"></span>'
        "<table><thead><tr><th>h</th></tr></thead><tbody><tr><th>r</th><td>1</td></tr></tbody></table>"
    )
    done = finish(page, "x.ipynb")
    assert '<a href="#fig-b">Figure 2</a>' in done and '<a href="#one">One</a>' in done
    assert 'id="one"' in done and 'id="one-2"' in done and '<li><a href="#one-2">One</a></li>' in done
    assert '<th scope="col">h' in done and '<th scope="row">r' in done and "Table in the section One" in done
    with pytest.raises(UserError, match=r"x.ipynb: reference '#fig-c'.*did you mean 'fig-b'"):
        finish('<h2>One</h2><span class="number" data-ref="fig-b"></span><a href="#fig-c"></a>', "x.ipynb")


def test_a_data_frame_and_a_markdown_table_become_accessible(tmp_path):
    frame = new_output("display_data", {"text/html": "<table class='dataframe'><tr><th></th><th>a</th></tr></table>"})
    cells = [new_markdown_cell("# T\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"), new_code_cell("x", outputs=[frame])]
    (tmp_path / "x.html").write_text(convert(new_notebook(cells=cells), [], {}, "x"))
    assert check_html(tmp_path / "x.html") == []


def rendered(project):
    reports = project / "reports"
    return render(project, reports / "runs", reports / "published", reports / "index.html")


def test_the_whole_report(project):
    page = rendered(project)
    text = page.read_text()
    assert check_html(page) == []
    assert "alert(\"x\")" not in text and "alert(&quot;x&quot;)" in text
    assert "Of 8 compressed strategies" in text and "published record" in text
    assert 'href="#fig-headline">Figure 1<' in text and '<span class="number">Table 1.</span>' in text
    assert "qlib run params/gptq-int4.yaml" in text and 'aria-label="Failure of gptq-int4"' in text
    assert "never stitched" not in text and "An Exception was encountered" not in text
    assert "http://www.w3.org" in text and not re.search(r'(src|href)="https?://', text)
    attached = (project / "reports" / "notebooks" / "rtn-int4.html").read_text()
    assert "New prose: accuracy 90.5" in attached and "Old prose" not in attached
    halfway = (project / "reports" / "notebooks" / "gptq-int4.html").read_text()
    assert "accuracy not measured" in halfway and "An Exception was encountered" not in halfway

    executed = project / "reports" / "runs" / "cache" / "report" / "report.ipynb"
    stamp, begun = executed.stat().st_mtime_ns, time.perf_counter()
    source = project / "notebooks" / "report.ipynb"
    content = json.loads(source.read_text())
    content["cells"][0]["source"] = "# Another title\n\n{{ verdict: rtn-int2 }}"
    source.write_text(json.dumps(content))
    assert "Another title" in rendered(project).read_text()
    assert executed.stat().st_mtime_ns == stamp  # editing prose executes nothing
    assert time.perf_counter() - begun < 10

    content["cells"][0]["source"] = "# Another title\n\n{{ rtn-int2: quality.klx }}"
    source.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"notebooks/report.ipynb: cell title: placeholder '\{\{ rtn-int2: quality.klx"):
        rendered(project)
    assert "Another title" in page.read_text()  # the page before it stays


def test_no_page_names_a_folder_of_the_machine(project):
    file = project / "reports" / "runs" / "reference-2" / "cpu" / "rtn-int4" / "notebook.ipynb"
    notebook = nbformat.read(file, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    printed = f"{project.resolve()}/qlib/walk.py:3 /a/lib/site-packages/torch/x.py {Path.home()}/.cache/kernels"
    cell.outputs.append(nbformat.v4.new_output("stream", text=printed))
    nbformat.write(notebook, file)
    page = rendered(project)
    attached = (page.parent / "notebooks" / "rtn-int4.html").read_text()
    assert "qlib/walk.py:3 torch/x.py ~/.cache/kernels" in attached and str(project.resolve()) not in attached


def test_a_report_about_nothing_is_a_report(project):
    shutil.rmtree(project / "reports")
    text = rendered(project).read_text()
    assert "No compressed strategy has been measured yet." in text and "not measured yet" in text
    assert "Nothing has been run yet." in text and "not measured here: run make bench" in text


def test_a_cell_that_fails_is_named(project):
    source = project / "notebooks" / "report.ipynb"
    notebook = nbformat.read(source, as_version=4)
    notebook.cells = notebook.cells[:2] + [new_code_cell("1 / 0", id="boom")]
    nbformat.write(notebook, source)
    with pytest.raises(UserError, match="report.ipynb: cell .* failed: ZeroDivisionError"):
        rendered(project)
    assert not (project / "reports" / "index.html").exists()


def test_a_figure_without_data_says_so_in_a_line():
    from matplotlib.figure import Figure

    from qlib.report.show import figure_html

    page = figure_html(Figure(), "x", "caption", "Nothing <was> drawn.", pandas.DataFrame({"a": []}))
    assert "Nothing &lt;was&gt; drawn." in page and "<svg" not in page and "<details" not in page
    assert 'data-ref="fig-x"' in page  # references still find it


def test_the_pages_of_published_records_stay_beside_the_report(project):
    reports = project / "reports"
    kept = reports / "published" / "notebooks" / "wanda-50.html"
    kept.parent.mkdir()
    kept.write_text('<a href="../index.html">The report</a><p>executed long ago</p>')
    target = render(project, reports / "runs", reports / "published", reports / "mine.html")
    page = target.parent / "notebooks" / "wanda-50.html"
    assert page.read_text() == '<a href="../mine.html">The report</a><p>executed long ago</p>'
    section = BeautifulSoup(target.read_text(), "html.parser").find(id="strategy-wanda-50").find_parent("details")
    assert section.find("a", href="notebooks/wanda-50.html")
    assert section.find("table") and not section.find("figure")


def test_the_figures_of_those_pages_stand_in_the_report_under_its_own_numbers(project):
    reports = project / "reports"
    kept = reports / "published" / "notebooks" / "wanda-50.html"
    kept.parent.mkdir()
    caption = '<figcaption><span class="caption"><span class="number">Figure {}.</span> {}.</span></figcaption>'
    figure = '<figure class="fig" id="fig-{}"><svg role="img" aria-label="a"><title>a</title><use href="#m"/></svg>{}</figure>'
    figures = [figure.format(name, caption.format(at, name)) for at, name in ((7, "errors"), (8, "stayed"))]
    kept.write_text(f"<p>long ago</p>{figures[0]}<p>and</p>{figures[1]}")
    target = render(project, reports / "runs", reports / "published", reports / "mine.html")
    page = BeautifulSoup(target.read_text(), "html.parser")
    found = page.find(id="strategy-wanda-50").find_parent("details").find_all("figure")
    assert [one["id"] for one in found] == ["fig-wanda-50-errors", "fig-wanda-50-stayed"]
    numbers = [one.find(class_="number").text for one in page.find_all("figure") if one.find(class_="number")]
    assert numbers == [f"Figure {at + 1}." for at in range(len(numbers))]
    assert check_html(target) == []
