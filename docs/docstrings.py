"""Docstrings as the package has them, plain text, made ready for Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"`[^`\n]*`|^ *(?:>>>|\.\.\.).*$", re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Stars are products and optima, no emphasis; `Example:` holds a doctest."""

    def on_instance(self, *, node: Any, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites an object's docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The docstring with its stars escaped outside of code.

    Args:
        docstring: Plain text with Google's sections.

    Returns:
        Markdown with Google's sections.

    Example:
        >>> as_markdown("`*args`: theta* and 2 * theta")
        '`*args`: theta\\\\* and 2 \\\\* theta'
    """
    parts, end = [], 0
    for code in CODE.finditer(docstring):
        parts += [docstring[end : code.start()].replace("*", "\\*"), code[0]]
        end = code.end()
    text = "".join(parts) + docstring[end:].replace("*", "\\*")
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
