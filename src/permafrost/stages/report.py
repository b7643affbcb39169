"""Stage report: the tables and the plots."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from permafrost.artifacts import load_record, save_json, save_record, write_atomically
from permafrost.claims import Tested, all_claims, claims_table, held_against, kept_and_learned
from permafrost.errors import InputError
from permafrost.evaluation import accuracy_name, share
from permafrost.hyper import as_text
from permafrost.params import Params
from permafrost.plots import draw_trade_off
from permafrost.runs.spec import RunSpec
from permafrost.stages.shared import (
    CLAIMS,
    COMPARISON,
    SWEEP,
    TABLES,
    TRADE_OFF_PICTURE,
    TRADE_OFF_POINTS,
    TUNE,
    VARIANT,
    open_stage,
)
from permafrost.tables import (
    Row,
    accuracy_table,
    escape,
    groups,
    markdown,
    measure,
    measures,
    paired,
    percent,
)

# What the post's text states (Feenstra & Dow 2023); its tables were pictures. Percent.
POST_BY_PCT = {"25%": ("20.7", "39.2"), "75%": ("38.4", "25.7")}
POST_BEFORE = ("45.7", "13.2")

_FAILURES_TOLD = 3


def run() -> None:
    """Write the comparison, its tables, its plot, and what it says of claims."""
    with open_stage("report") as params:
        variant = load_record(VARIANT)
        rows = with_variant(load_record(SWEEP), variant["seeds"])
        choices = load_record(TUNE)["heads"]
        text = tables(rows, params, choices)
        write_atomically(TABLES, text.encode())
        write_atomically(CLAIMS, claims(rows, params).encode())
        save_record(COMPARISON, comparison(rows, params))
        _draw(rows, params)
        print(f"report: the tables are in {TABLES}, what they say of claims in {CLAIMS}")


def refuse_failures(rows: list[Row]) -> None:
    """Raise an InputError that names runs that have failed, if there are any."""
    failed = _failed(rows)
    if failed:
        shown = ", ".join(f"{name} ({error})" for name, error in failed[:_FAILURES_TOLD])
        more = f" and {len(failed) - _FAILURES_TOLD} more" if len(failed) > _FAILURES_TOLD else ""
        raise InputError(
            f"sweep: {len(failed)} of {len(rows)} runs failed: {shown}{more}; {TABLES} shows them"
        )


def _failed(rows: list[Row]) -> list[tuple[str, str]]:
    """Return the names of the failed runs, and why each failed."""
    return [(RunSpec.of(row).name, row["error"]) for row in rows if row["status"] == "failed"]


def with_variant(rows: list[Row], variant: list[Row]) -> list[Row]:
    """Add the variant's rows, unless the sweep has them; the shares in ascending order."""
    known = {row["key"] for row in rows}
    together = rows + [row for row in variant if row["key"] not in known]
    return sorted(together, key=lambda row: row["pct"] or 0)


def comparison(rows: list[Row], params: Params) -> dict[str, Any]:
    """Return the means and intervals of the tables as numbers, by head and method.

    Parameters
    ----------
    rows : list of dict
        Of the sweep and the variant.
    params : Params
        All parameters.

    Returns
    -------
    dict
        Nested by head and strategy, of ``freeze`` also by metric and share, of ``joint`` by its
        length; ``seeds`` says how many of them count, which are all that did not fail.
    """
    compared: dict[str, Any] = {}
    named = [row | {"method": _method(row, params)} for row in rows]
    for group, members in groups(named, "head", "method"):
        place = compared.setdefault(group["head"], {})
        for name in group["method"]:
            place = place.setdefault(name, {})
        found = measures(members, len(params.split.sizes))
        place |= {name: interval and asdict(interval) for name, interval in found.items()}
        place["seeds"] = sum(row["status"] == "done" for row in members)
    return compared


def _method(row: Row, params: Params) -> tuple[str, ...]:
    """Return where the comparison has a row's method."""
    if row["strategy"] == "freeze":
        return "freeze", row["metric"], share(row["pct"])
    if row["strategy"] == "joint":
        return "joint", _length(row["hyper"]["passes"], params)
    return (label(row),)


def _length(passes: float, params: Params) -> str:
    return f"{params.joint_epochs(passes)} epochs"


def tables(rows: list[Row], params: Params, choices: dict[str, Any]) -> str:
    """Return all tables as Markdown, for each head.

    Parameters
    ----------
    rows : list of dict
        Of the sweep and the variant.
    params : Params
        All parameters.
    choices : dict
        Under each head, each method's chosen hyperparameters and trials.
    """
    title = f"# Results: {params.split.datasets}, profile {escape(params.profile)}"
    parts = [title, _preamble(params)]
    for head in params.sweep.heads:
        mine = [row for row in rows if row["head"] == head]
        parts += [
            f"## Head `{head}`",
            *_by_pct(mine, params),
            *_by_metric(mine, params, choices[head]),
            *_methods(mine, rows, params, choices[head]),
            *_twins(mine, params),
        ]
    return "\n\n".join([*parts, *_failures(rows), *_assumptions(params)]) + "\n"


def claims(rows: list[Row], params: Params) -> str:
    """Return what the comparison says of the post's, the papers' and its own claims, as Markdown.

    Parameters
    ----------
    rows : list of dict
        Of the sweep and the variant.
    params : Params
        All parameters.
    """
    parts = [f"# Claims: {params.split.datasets}, profile {escape(params.profile)}", _TESTS]
    for head in params.sweep.heads:
        tested = claims_of([row for row in rows if row["head"] == head], params)
        table = claims_table(tested) if tested else _NOTHING
        parts += [f"## Head `{head}`", table]
    return "\n\n".join(parts) + "\n"


def claims_of(rows: list[Row], params: Params) -> list[Tested]:
    """Return what rows under one head say of claims; of filters in reverse order there are none."""
    return [] if params.rank.reverse else held_against(rows, all_claims(rows))


_NOTHING = (
    "There is nothing to compare: the sweep has no two methods of which something is claimed, or "
    "freezes the worst filters first (`rank.reverse`)."
)
_TESTS = (
    "Differences in points, paired by seed, with their 95% intervals by Student's t. Effect size: "
    "the mean over the standard deviation of the seeds' differences. p: of the paired t test, "
    "adjusted for the number of claims (Holm 1979); below 0.05 a claim holds, or its opposite. "
    "Kept: the mean accuracy on the tasks before the last; learned: that on the last. At equal "
    "learning what a share of frozen filters keeps is held against what the other ranking keeps "
    "where it learns as much, and the other way round: between shares, fine-tuning among them, by "
    "linear interpolation of accuracies that isotonic regression has made fall with the share; "
    "points beyond the other ranking's range do not count."
)


def _failures(rows: list[Row]) -> list[str]:
    failed = _failed(rows)
    if not failed:
        return []
    return [
        "## Failed trainings",
        "They count in no mean above.",
        markdown(["training", "why"], failed),
    ]


def _preamble(params: Params) -> str:
    return (
        f"Test accuracy in percent after the last task: {_average(params.seeds)}. "
        "Forgetting is how far the accuracies on the earlier tasks lie below their best, mean over "
        "these tasks (Chaudhry et al. 2018)."
    )


def _average(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"of one training (seed {seeds[0]}), without an interval"
    return (
        f"mean over the seeds ({', '.join(map(str, seeds))}) and, in brackets, its 95% interval by "
        "Student's t on the logit scale, which stays within what is possible; where all seeds are "
        "equal it has no width, and says nothing about other seeds"
    )


def _of(rows: list[Row], strategy: str) -> list[Row]:
    return [row for row in rows if row["strategy"] == strategy]


def _by_pct(rows: list[Row], params: Params) -> list[str]:
    parts = []
    for group, members in groups(_of(rows, "freeze"), "metric"):
        lines = [(["fine-tuning"], _of(rows, "finetune"))]
        lines += [([f"{share(g['pct'])}"], found) for g, found in groups(members, "pct")]
        lines += [(["all (linear probe)"], _of(rows, "linear_probe"))]
        quoted = _quotes_the_post(params) and group["metric"] == "mse"
        parts += [
            f"### By share of frozen filters, ranked by {escape(group['metric'])}",
            accuracy_table(
                ["frozen"],
                _present(lines),
                len(params.split.sizes),
                more=_post_column(POST_BY_PCT) if quoted else None,
                headings=("post: task 1", "post: task 2") if quoted else (),
            ),
        ]
    return parts


def _by_metric(rows: list[Row], params: Params, choices: dict[str, Any]) -> list[str]:
    pct = choices["freeze"]["chosen"]["pct"]
    at_pct = [row for row in _of(rows, "freeze") if row["pct"] == pct]
    if not at_pct:
        return []
    lines = [([group["metric"]], members) for group, members in groups(at_pct, "metric")]
    return [
        f"### By metric, {share(pct)} of the filters frozen",
        accuracy_table(["metric"], lines, len(params.split.sizes)),
    ]


def _methods(
    rows: list[Row],
    all_rows: list[Row],
    params: Params,
    choices: dict[str, Any],
) -> list[str]:
    """Return the table of all methods, joint training among them."""
    pct = choices["freeze"]["chosen"]["pct"]
    lines: list[tuple[list[str], list[Row]]] = []
    labelled = [row | {"label": label(row)} for row in rows if row["strategy"] != "joint"]
    for group, members in groups(labelled, "strategy", "label"):
        if group["strategy"] == "freeze":
            at_pct = [row for row in members if row["pct"] == pct]
            lines += [
                ([f"freeze {g['metric']} {share(pct)}"], found)
                for g, found in groups(at_pct, "metric")
            ]
        else:
            lines.append(([group["label"]], members))
    lines += _joint_lines(rows, all_rows, params)
    present = _present(lines)
    return [
        "### Methods",
        accuracy_table(["method"], present, len(params.split.sizes)),
        "Task not told: one softmax over all classes of all tasks; where a method keeps a mask for "
        "each task, their answers are joined. Memory is what a method keeps besides the network; "
        "free filters are those of all layers, and of the fullest one, that are not frozen at the "
        "end.",
        markdown(["method", *_COSTS], [[*first, *_costs(members)] for first, members in present]),
        *_choices(choices),
    ]


def label(row: Row) -> str:
    """Name a method, and what takes the explanation's place if it is a twin."""
    twin = row.get("twin")  # a row of an older version has none
    return f"{row['strategy']}, twin by {twin}" if twin else str(row["strategy"])


def _twins(rows: list[Row], params: Params) -> list[str]:
    """Return how far each explained method is above its twins, paired by seed."""
    if not params.sweep.twins:
        return []
    done = [row | {"label": label(row)} for row in rows if row["status"] == "done"]
    by_name = {RunSpec.of(row).name: row for row in done}
    found: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for row in done:
        for twin in filter(None, map(by_name.get, row.get("controlled_by", []))):
            pair = " ".join(_method(row, params)), twin["twin"] or twin["metric"]
            found.setdefault(pair, []).append((row, twin))
    names = [*map(accuracy_name, range(len(params.split.sizes))), "acc_mean"]
    lines = [
        [method, twin, *(percent(paired(pairs, name)) for name in names)]
        for (method, twin), pairs in found.items()
    ]
    columns = [*(f"task {task + 1}" for task in range(len(params.split.sizes))), "mean"]
    return [
        "### Explained, minus its twin",
        "Differences in points, paired by seed. A twin is the same method with something else in "
        "the place of the explanation: chance, equal shares or weights, magnitude, depth, or an "
        "untrained network.",
        markdown(["method", "twin", *columns], lines),
    ]


_COSTS = ("mean, task not told", "memory (MB)", "free filters", "remark")


def _costs(rows: Sequence[Row]) -> Sequence[str]:
    done = [row for row in rows if row["status"] == "done"]
    remark = rows[0].get("remark", "")  # a row of an older version has none
    if not done:
        return "–", "–", "–", remark
    size, free, least = (
        sum(row[name] for row in done) / len(done)
        for name in ("memory_bytes", "free_filters", "free_filters_least")
    )
    left = dict.fromkeys(f"{100 * part:.0f}%" for part in (free, least))
    untold = percent(measure(done, "acc_mean_without_task"))
    return untold, f"{size / 1e6:.2f}", ", ".join(left), remark


def _choices(choices: dict[str, Any]) -> list[str]:
    """Return each method's hyperparameters, and of how many trials they were chosen."""
    lines, tried = [], any(choice["trials"] for choice in choices.values())
    for name, choice in choices.items():
        used = ", ".join(
            f"{key} {as_text(value)}"
            + (" (at the edge of its grid)" if key in choice["at_edge"] else "")
            for key, value in choice["chosen"].items()
        )
        trials = str(len(choice["trials"])) if choice["trials"] else "none: as declared"
        lines.append([name, used, *([trials] if tried else [])])
    if not tried:
        return [
            "Hyperparameters, as declared; none was chosen on images:",
            markdown(["method", "hyperparameters"], lines),
        ]
    return [
        "Hyperparameters. Of the trials, that with the highest mean accuracy on validation images "
        "of the first seed was chosen:",
        markdown(["method", "hyperparameters", "trials"], lines),
    ]


def _joint_lines(
    rows: list[Row], all_rows: list[Row], params: Params
) -> list[tuple[list[str], list[Row]]]:
    """Return joint training's lines: under this head, and with one softmax of all classes.

    The mean of the latter is the plain average over all classes, the post's number for joint
    training.
    """
    joint = [row | {"passes": row["hyper"]["passes"]} for row in _of(all_rows, "joint")]
    lines: list[tuple[list[str], list[Row]]] = []
    for group, members in groups(joint, "passes", "head"):
        length = f"joint, {_length(group['passes'], params)}"
        if len(members) < len(params.seeds):
            length += " (1 seed)" if len(members) == 1 else f" ({len(members)} seeds)"
        if group["head"] == rows[0]["head"]:
            lines.append(([length], members))
        elif group["head"] == "expanding":
            lines.append(([f"{length}, one softmax of all classes"], members))
    return lines


def _present(
    lines: list[tuple[list[str], list[Row]]],
) -> list[tuple[Sequence[str], Sequence[Row]]]:
    return [(first, members) for first, members in lines if members]


def _post_column(
    figures: dict[str, tuple[str, str]],
) -> Callable[[Sequence[str], Sequence[Row]], Sequence[str]]:
    return lambda first, _rows: figures.get(first[0], ("–", "–"))


def _quotes_the_post(params: Params) -> bool:
    return params.profile == "paper" and len(params.split.sizes) == 2  # the post has no third


def _assumptions(params: Params) -> list[str]:
    """List what the post does not say, where its figures are quoted."""
    if not _quotes_the_post(params):
        return []
    model, train = params.model, params.train
    return [
        "## The post's figures and what it does not say",
        f"Before the second task the post reports {POST_BEFORE[0]} on task 1 and {POST_BEFORE[1]} "
        "on task 2, from one run without intervals. It is silent about the following; these are "
        "assumptions:",
        "\n".join(
            [
                f"- BatchNorm: {'after every convolution' if model.batch_norm else 'none'}",
                f"- momentum: {train.momentum}",
                f"- batch size: {train.batch_size}",
                f"- precision of training: {train.precision}",
                f"- head: {' and '.join(params.sweep.heads)}, side by side",
                f"- how a filter's picture becomes one map: {params.visualize.heat_map}",
                f"- frozen BatchNorm: {params.freeze.batch_norm}",
                f"- saliency: {params.saliency.method}, reading {params.saliency.reading}",
            ]
        ),
    ]


def _draw(rows: list[Row], params: Params) -> None:
    head = params.sweep.heads[0]
    mine = [row for row in rows if row["head"] == head and row["status"] == "done"]
    points = [
        _point(group, members) for group, members in groups(_of(mine, "freeze"), "metric", "pct")
    ]
    others = [row for row in labelled(mine, params) if row["strategy"] != "freeze"]
    seeds = len({row["seed"] for row in mine})
    single = [_point(group, members) for group, members in groups(others, "label")]
    about = f"{params.split.datasets}, head {head}, {seeds} seed{'s' if seeds != 1 else ''}"
    draw_trade_off(TRADE_OFF_PICTURE, points, single, len(params.split.sizes), about)
    save_json(
        TRADE_OFF_POINTS,
        [
            {
                "method": method,
                "frozen": point.get("pct"),
                "name": " ".join([method, *([share(point["pct"])] if "pct" in point else [])]),
                "kept": point["kept"].mean,
                "learned": point["learned"].mean,
                "seeds": point["seeds"],
            }
            for point in [*points, *single]
            for method in [point.get("label") or f"freeze {point['metric']}"]
        ],
    )


def labelled(rows: Sequence[Row], params: Params) -> list[Row]:
    """Add to each row its method's name, and how many seeds it has where these are fewer."""
    seeds: dict[str, set[int]] = {}
    names = [full_label(row, params) for row in rows]
    for name, row in zip(names, rows, strict=True):
        seeds.setdefault(name, set()).add(row["seed"])
    usual = len({row["seed"] for row in rows})
    counts = {name: len(found) for name, found in seeds.items()}
    told = {
        name: f"{name} ({count} seed{'s' if count != 1 else ''})" if count < usual else name
        for name, count in counts.items()
    }
    return [row | {"label": told[name]} for row, name in zip(rows, names, strict=True)]


def full_label(row: Row, params: Params) -> str:
    """Name a method as :func:`label`, joint training with its length."""
    passes = row["hyper"].get("passes")
    return f"{label(row)}, {_length(passes, params)}" if passes else label(row)


def _point(group: Row, members: list[Row]) -> dict[str, Any]:
    found = {name: measure(map(kept_and_learned, members), name) for name in ("kept", "learned")}
    return group | found | {"seeds": len({row["seed"] for row in members})}
