"""The frame of a page: head, style, sections, and a policy under which nothing but its own script can run."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from modeling_deepseek_moe._version import __version__
from modeling_deepseek_moe.pages.texts import label, plain

FOLDER = Path(__file__).parent


def style(*names: str) -> str:
    return "\n".join((FOLDER / f"{name}.css").read_text(encoding="utf-8") for name in names)


def document(
    kind: str,
    name: str,
    *,
    about: Iterable[str],
    links: Iterable[tuple[str, str]],
    body: str,
    css: str = "",
    data: str = "",
    script: str = "",
) -> str:
    """A whole page, which loads nothing.

    Args:
        kind: what is reported, the heading; ``name``: of what, in the title.
        about: lines of HTML under the heading.
        links: id and name of each section of ``body``, which is HTML.
        css: on top of the shared style.
        data: HTML of scripts that hold no code; ``script``: the code.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        kind=kind,
        name=plain(name),
        policy=f"'sha256-{digest}'" if script else "'none'",
        style=style("theme", "plots", "page") + css,
        about="".join(f"<li>{line}</li>" for line in about),
        links="".join(f'<a href="#{place}">{text}</a>' for place, text in links),
        body=body,
        data=data,
        script=f"<script>{script}</script>" if script else "",
        version=plain(__version__),
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """``heads`` and ``caption`` are plain text; the cells of ``rows`` are HTML. ``kind``: class for the style; the rows of
    ``named`` tables are cards on a phone."""
    head = "".join(f'<th scope="col">{label(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f'<td data-label="{plain(text)}">{cell}</td>' for text, cell in zip(heads[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{label(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"</table></div>"
    )
