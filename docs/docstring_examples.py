"""A griffe extension: doctests at the end of our docstrings become the section `Examples` of the reference."""

import re

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class Examples(griffe.Extension):
    """Adds the heading that griffe needs to recognize an example."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Indent every doctest under a heading."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(
                lambda match: "Examples:\n    " + match[0].replace("\n", "\n    "), obj.docstring.value
            )
