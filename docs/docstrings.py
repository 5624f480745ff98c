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
    """The docstring with its stars and brackets made literal outside of code.

    Args:
        docstring: Plain text with Google's sections.

    Returns:
        Markdown with Google's sections.

    Example:
        >>> as_markdown("`*args`: theta* and x[0] [N]")
        '`*args`: theta&#42; and x&#91;0] &#91;N]'
    """
    parts, end = [], 0
    for code in CODE.finditer(docstring):
        parts += [_literal(docstring[end : code.start()]), code[0]]
        end = code.end()
    text = "".join(parts) + _literal(docstring[end:])
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _literal(text: str) -> str:
    return text.replace("*", "&#42;").replace("[", "&#91;")
