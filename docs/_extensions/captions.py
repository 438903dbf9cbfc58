"""An image that stands alone and has a title is a figure with that caption.

``![what is to be seen](figure.png "What it shows.")`` is an image with a tooltip on a
page of the repository, and a figure here. One without a description or, where it stands
alone, without a title is an error.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

LOG = logging.getLogger(__name__)


class Captions(SphinxTransform):
    """Makes figures of images."""

    default_priority = 200

    def apply(self, **kwargs: object) -> None:
        """Change the tree of one page."""
        for image in list(self.document.findall(nodes.image)):
            if not image.get("alt"):
                LOG.warning("an image without a description", location=image)
            paragraph, title = image.parent, image.get("title")
            alone = isinstance(paragraph, nodes.paragraph) and len(paragraph) == 1
            if alone and not title:
                LOG.warning("a figure without a caption", location=image)
            elif alone:
                figure = nodes.figure("", image, nodes.caption(title, title))
                paragraph.replace_self(figure)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform."""
    app.add_transform(Captions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
