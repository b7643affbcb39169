"""The picture of what explanations add: methods beside themselves without the explanation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permafrost.claims import MEAN, Tested
from permafrost.figures import COLOURS, save, subplots

# Of each verdict the points' style.
_STYLES = {
    "holds": {"marker": "o", "color": COLOURS[0]},
    "does not hold": {"marker": "D", "color": COLOURS[1]},
    "undecided": {"marker": "o", "color": COLOURS[6], "markerfacecolor": "white"},
}
# Methods that add an explanation to another one.
_WITHOUT = {"lwm": "lwf", "rrr": "replay"}
_ROW = 0.28  # inches


def of_explanations(tested: Mapping[str, Sequence[Tested]]) -> dict[str, list[Tested]]:
    """Return the claims, by piece, whose other side is the same method without the explanation."""
    kept = {piece: [e for e in members if _is_of_twin(e)] for piece, members in tested.items()}
    return {piece: members for piece, members in kept.items() if members}


def _is_of_twin(each: Tested) -> bool:
    left, right = each.claim.left, each.claim.right
    if left["strategy"] == right["strategy"]:
        is_twin = right.get("twin") is not None or right.get("metric") == "random"
    else:
        is_twin = _WITHOUT.get(left["strategy"]) == right["strategy"]
    return is_twin and each.difference is not None


def draw_forest(path: Path, tested: Mapping[str, Sequence[Tested]], title: str) -> None:
    """Draw each claim's difference with its 95% interval, in groups under their headings.

    Parameters
    ----------
    path : Path
        The PNG to write.
    tested : mapping of str to sequence of Tested
        Headings and their claims, none of which lacks a difference.
    title : str
        What is drawn.
    """
    count = sum(map(len, tested.values())) + len(tested)
    figure, axis = subplots(figsize=(9, 1.3 + _ROW * count))
    names: dict[int, str] = {}
    place = 0
    for heading, members in tested.items():
        names[place] = heading
        for row, each in enumerate(members, start=place + 1):
            names[row] = _name(each)
            _draw(axis, row, each)
        place += len(members) + 1
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.set_ylim(place - 0.4, -0.6)
    axis.set_yticks(list(names), list(names.values()), fontsize=8)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in tested else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("difference, points of accuracy; 95% intervals")
    axis.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))  # each verdict once
    figure.legend(shown.values(), shown, fontsize=8, loc="outside lower right", ncols=len(shown))
    save(figure, path, dpi=150)


def _name(each: Tested) -> str:
    """Return a claim's text, what is measured if not the mean accuracy, and what leaves it open."""
    about = [each.claim.measure] if each.claim.measure != MEAN else []
    if each.p_adjusted is None:
        about.append("some runs failed")
    return f"{each.claim.text} ({'; '.join(about)})" if about else each.claim.text


def _draw(axis: Any, row: int, each: Tested) -> None:
    found = each.difference
    assert found is not None
    low, high = (100 * (found.mean if v is None else v) for v in (found.low, found.high))
    style = _STYLES[each.verdict]
    axis.plot([low, high], [row, row], color=style["color"], linewidth=1.5)
    axis.plot(100 * found.mean, row, linestyle="none", markersize=6, label=each.verdict, **style)
