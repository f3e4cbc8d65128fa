"""The exporter: nbconvert's, with our template and nothing of its own that reaches for the network."""

from pathlib import Path

from nbconvert.exporters import HTMLExporter, TemplateExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from traitlets.config import Config

__all__ = ["Page"]

#: Text before pictures, no scripts, no widgets: what a page without network can show.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]


class Page(HTMLExporter):
    """Notebook to one page. The template lies beside this module."""

    def __init__(self, **kw) -> None:
        folder = Path(__file__).parent
        kw |= {"template_name": "template", "extra_template_basedirs": [str(folder)]}
        super().__init__(**kw, config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}))
        self.exclude_anchor_links = True  # `structure` makes them
        self.embed_images = True

    def from_notebook_node(self, nb, resources=None, **kw):
        """As in nbconvert, without its last step, which rewrites the page and invents alternative texts."""
        language = nb.metadata.get("language_info", {})
        lexer = language.get("pygments_lexer", language.get("name", "python3"))
        resources = self._init_resources(resources)
        self.register_filter("highlight_code", Highlight2HTML(pygments_lexer=lexer, parent=self))
        data = WidgetsDataTypeFilter(notebook_metadata=nb.metadata, parent=self, resources=resources)
        self.register_filter("filter_data_type", data)
        return TemplateExporter.from_notebook_node(self, nb, resources, **kw)
