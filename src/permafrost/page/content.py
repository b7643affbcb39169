"""What the page says, put into its template."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from permafrost.claims import Tested
from permafrost.tables import Row


def render(**parts: Any) -> str:
    """Return the page, a file that needs no other.

    Parameters
    ----------
    **parts
        What the template names: see ``template.html``.
    """
    environment = Environment(
        loader=PackageLoader("permafrost", "page"), autoescape=True, undefined=StrictUndefined
    )
    own = files("permafrost.page")
    return environment.get_template("template.html").render(
        style=own.joinpath("style.css").read_text(),
        script=own.joinpath("page.js").read_text(),
        plotly=get_plotlyjs(),
        **parts,
    )


def tables_as_html(markdown: str) -> str:
    """Return Markdown of the reports as HTML, a level of headings deeper.

    Wide tables scroll by themselves; HTML in the Markdown is shown as text.
    """
    made = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for level in (4, 3, 2, 1):
        made = made.replace(f"<h{level}>", f"<h{level + 1}>")
        made = made.replace(f"</h{level}>", f"</h{level + 1}>")
    wrapped = made.replace("<table>", '<div class="wide"><table>')
    return wrapped.replace("</table>", "</table></div>")


def verdicts(tested: Mapping[str, Sequence[Tested]]) -> list[dict[str, str]]:
    """Return in words what came out for each explanation against chance, by head.

    Parameters
    ----------
    tested : mapping of str to sequence of Tested
        By head.
    """
    found = []
    for head, claims in tested.items():
        for each in claims:
            if not _of_an_explanation(each):
                continue
            name = {"text": f"{each.claim.text[:1].upper()}{each.claim.text[1:]}, head {head}"}
            if each.difference is None:
                beyond = "no share of one learns as much as some of the other"
                found.append(name | {"verdict": each.verdict, "figure": beyond})
                continue
            more = f"{100 * each.difference.mean:+z.1f} points"
            if each.difference.low is not None and each.difference.high is not None:
                low, high = 100 * each.difference.low, 100 * each.difference.high
                more += f" (95%: {low:+z.1f} to {high:+z.1f})"
            seeds = each.difference.seeds
            found.append(
                name
                | {
                    "verdict": each.verdict,
                    "figure": f"{more}, {seeds} seed{'s' if seeds > 1 else ''}",
                }
            )
    return found


def _of_an_explanation(tested: Tested) -> bool:
    right = tested.claim.right
    return right.get("metric") == "random" or bool(right.get("twin"))


def downloads(named: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return rows for the page's buttons, each with a name and its columns."""
    return [
        {
            "name": name,
            "columns": list(dict.fromkeys(column for row in rows for column in row)),
            "rows": list(rows),
        }
        for name, rows in named.items()
    ]


def settings_as_text(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return nested settings as dotted names and texts."""
    lines: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += [(f"{name}.{inner}", text) for inner, text in settings_as_text(value)]
        else:
            lines.append((name, str(value)))
    return lines
