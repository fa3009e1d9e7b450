"""What MkDocs cannot do by itself: one page of API reference per package, links out of docs/, and formulas."""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = "unipool_jax"

_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)\)")

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages `api/PACKAGE.md`, and the pictures of other folders that pages show."""
    packages = sorted(path.parent for path in (ROOT / PACKAGE).glob("*/__init__.py"))
    overview = "# API reference\n\nMade from the docstrings.\n\n"
    for folder in packages:
        summary = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        summary = summary.partition("\n")[0]
        overview += f"- [`{PACKAGE}.{folder.name}`]({folder.name}.md){summary and f': {summary}'}\n"
    files.append(File.generated(config, "api/index.md", content=f"{overview}\n::: {PACKAGE}\n"))
    for folder in packages:
        modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
        directives = "\n\n".join(f"::: {PACKAGE}.{folder.name}.{module}" for module in modules)
        text = f"# {folder.name}\n\n{directives}\n"
        files.append(File.generated(config, f"api/{folder.name}.md", content=text))
    pictures = {
        posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), link))
        for page in files.documentation_pages()
        for mark, _, link in _OUTSIDE.findall(page.content_string)
        if mark
    }
    for path in sorted(pictures):
        files.append(File.generated(config, f"repository/{path}", content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to files outside docs/ become their paths in the repository; pictures there are shown."""
    folder = posixpath.dirname(page.file.src_uri)

    def point(found: re.Match[str]) -> str:
        mark, text, link = found.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, link))
        if path.startswith("docs/"):
            return found.group(0)
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: links to {link}, but the repository has no {path}")
        if mark:
            return f"![{text}]({posixpath.relpath(f'repository/{path}', folder or '.')})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return _OUTSIDE.sub(point, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers show without a script."""

    def render(found: re.Match[str]) -> str:
        tag, formula = found.groups()
        return convert(html.unescape(formula), display="block" if tag == "div" else "inline")

    return _FORMULA.sub(render, content)
