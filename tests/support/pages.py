"""Execute the code of the documentation's pages."""

import re

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run_page(page):
    """All code of a page in one namespace, which is returned; line numbers are the page's."""
    text = page.read_text(encoding="utf-8")
    program = [""] * len(text.splitlines())
    for block in CODE.finditer(text):
        start = text[: block.start(1)].count("\n")
        lines = block[1].splitlines()
        program[start : start + len(lines)] = lines
    names = {"__name__": page.stem}
    exec(compile("\n".join(program), str(page), "exec"), names)
    return names
