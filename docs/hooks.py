"""What the site is made of besides its pages: committed results, formulas, the notebook."""

from __future__ import annotations

import base64
import html
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import latex2mathml.converter
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import quoted  # noqa: E402  (it lies beside this file)

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
PICTURE = re.compile(r'(<img [^>]*src="((?:\.\./)*results/[^"]+)"[^>]*>)')
FRAME_STYLE = re.compile(r"<style scoped>.*?</style>\s*", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the results' pictures, and the notebook as a page with its own."""
    for picture in sorted((ROOT / "results").rglob("*.png")):
        uri = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    page, pictures = notebook_page(HERE / "notebook.ipynb")
    files.append(File.generated(config, "notebook.md", content=page))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Puts the numbers of the committed tables in their places; an unknown one is an error."""
    if page.file.generated_by:
        return markdown
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(markdown).render(quoted.of_page(page.file.name))


def on_page_content(content: str, **kwargs: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves; pictures that open in full size."""
    content = PICTURE.sub(r'<a href="\2">\1</a>', content)
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    mathml: str = latex2mathml.converter.convert(html.unescape(match["latex"]), display=display)
    return mathml.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>')


def notebook_page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown.

    Args:
        notebook: With its outputs.

    Returns:
        The page, and its pictures by name.
    """
    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(notebook, as_version=4))
    # Tables in the site's own style.
    body = FRAME_STYLE.sub("", body).replace('border="1" class="dataframe"', "")
    pictures: dict[str, bytes] = {
        name: base64.b64decode(data) if isinstance(data, str) else data
        for name, data in resources["outputs"].items()
    }
    return body, pictures
