"""Stage report: the tables and the plots."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from permafrost.artifacts import load_record, save_json, write_atomically
from permafrost.cells import CellStore
from permafrost.errors import InputError
from permafrost.params import Params
from permafrost.pictures import draw_trade_off
from permafrost.plan import CellSpec
from permafrost.stages.workspace import (
    FILTER_PICTURES,
    RANK_PICTURES,
    SALIENCY_PICTURES,
    SWEEP,
    TABLES,
    TRADE_OFF_PICTURE,
    TRADE_OFF_POINTS,
    TUNE,
    VARIANT,
    open_stage,
    read_timings,
    seed_file,
)
from permafrost.strategies import STRATEGIES
from permafrost.tables import Row, accuracy_table, escape, groups, markdown, measure
from permafrost.variants import add_pictures

# What the seed's text states (Feenstra & Dow 2023); its tables were pictures. Percent.
SEED_BY_PCT = {"25%": ("20.7", "39.2"), "75%": ("38.4", "25.7")}
SEED_BEFORE = ("45.7", "13.2")

_FAILURES_TOLD = 3


def run() -> None:
    """Write the tables and the trade-off's plot, and add all pictures to the variant's run.

    Raises
    ------
    InputError
        If trainings of the sweep have failed; everything is written before, so that the tables
        show them beside the others.
    """
    with open_stage("report") as workspace:
        params = workspace.params
        variant = load_record(VARIANT)
        rows = _with_variant(load_record(SWEEP), variant["seeds"])
        choices = load_record(TUNE)["heads"]
        text = tables(rows, params, choices, _relative_times(workspace.store, rows))
        write_atomically(TABLES, text.encode())
        _draw(rows, params)
        add_pictures(workspace.store, variant, _pictures(params))
        print(f"report: the tables are in {TABLES}")
    failed = _failed(rows)
    if failed:
        shown = ", ".join(f"{name} ({error})" for name, error in failed[:_FAILURES_TOLD])
        more = f" and {len(failed) - _FAILURES_TOLD} more" if len(failed) > _FAILURES_TOLD else ""
        raise InputError(
            f"sweep: {len(failed)} of {len(rows)} cells failed: {shown}{more}; {TABLES} shows them"
        )


def _failed(rows: list[Row]) -> list[tuple[str, str]]:
    """Return the names of the failed cells, and why each failed."""
    found = []
    for row in rows:
        if row["status"] == "failed":
            hyper = tuple(sorted(row["hyper"].items()))
            spec = CellSpec(
                row["strategy"], row["seed"], row["head"], row["metric"], row["pct"], hyper
            )
            found.append((spec.name, row["error"]))
    return found


def _with_variant(rows: list[Row], variant: list[Row]) -> list[Row]:
    """Add the variant's rows, unless the sweep has them; the shares in ascending order."""
    known = {row["key"] for row in rows}
    together = rows + [row for row in variant if row["key"] not in known]
    return sorted(together, key=lambda row: row["pct"] or 0)


def _relative_times(store: CellStore, rows: list[Row]) -> dict[str, float]:
    """Return each training's seconds relative to fine-tuning's, by the cells' keys.

    What stage consolidate made for a method counts. Trainings whose stored cell is gone are left
    out.
    """
    done = [row for row in rows if row["status"] == "done"]
    seconds = {row["key"]: store.seconds(row["key"]) for row in done}
    plain = {(row["head"], row["seed"]): seconds[row["key"]] for row in _of(done, "finetune")}
    extra = read_timings().get("consolidate", {})
    times = {}
    for row in done:
        knowledge = STRATEGIES[row["strategy"]].knowledge
        own, base = seconds[row["key"]], plain.get((row["head"], row["seed"]))
        if own is not None and base:
            times[row["key"]] = (own + extra.get(f"{knowledge}@{row['seed']}", 0.0)) / base
    return times


def tables(
    rows: list[Row], params: Params, choices: dict[str, Any], times: dict[str, float]
) -> str:
    """Return all tables as Markdown, for each head.

    Parameters
    ----------
    rows : list of dict
        Of the sweep and the variant.
    params : Params
        All parameters.
    choices : dict
        Under each head, each method's chosen hyperparameters and trials.
    times : dict of str to float
        Each cell's training time relative to fine-tuning's.
    """
    title = f"# Results: {params.split.dataset}, profile {escape(params.profile)}"
    parts = [title, _preamble(params)]
    for head in params.sweep.heads:
        mine = [row for row in rows if row["head"] == head]
        parts += [
            f"## Head `{head}`",
            *_by_pct(mine, params),
            *_by_metric(mine, params, choices[head]),
            *_methods(mine, rows, params, choices[head], times),
        ]
    return "\n\n".join([*parts, *_failures(rows), *_assumptions(params)]) + "\n"


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
    seeds = ", ".join(str(seed) for seed in params.seeds)
    return (
        f"Test accuracy in percent after the last task: mean over the seeds ({seeds}) and, in "
        "brackets, its 95% interval by Student's t. Forgetting is what task 1 has lost since it "
        "was learned."
    )


def _of(rows: list[Row], strategy: str) -> list[Row]:
    return [row for row in rows if row["strategy"] == strategy]


def _by_pct(rows: list[Row], params: Params) -> list[str]:
    parts = []
    for group, members in groups(_of(rows, "freeze"), "metric"):
        lines = [(["0% (fine-tuning)"], _of(rows, "finetune"))]
        lines += [([f"{g['pct']:.0%}"], found) for g, found in groups(members, "pct")]
        lines += [(["all (linear probe)"], _of(rows, "linear_probe"))]
        quoted = params.profile == "paper" and group["metric"] == "mse"
        parts += [
            f"### By share of frozen filters, ranked by {escape(group['metric'])}",
            accuracy_table(
                ["frozen"],
                _present(lines),
                params.split.tasks,
                more=_seed_column(SEED_BY_PCT) if quoted else None,
                headings=("seed: task 1", "seed: task 2") if quoted else (),
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
        f"### By metric, {pct:.0%} of the filters frozen",
        accuracy_table(["metric"], lines, params.split.tasks),
    ]


def _methods(
    rows: list[Row],
    all_rows: list[Row],
    params: Params,
    choices: dict[str, Any],
    times: dict[str, float],
) -> list[str]:
    """Return the table of all methods, joint training among them."""
    pct = choices["freeze"]["chosen"]["pct"]
    lines: list[tuple[list[str], list[Row]]] = []
    for group, members in groups([r for r in rows if r["strategy"] != "joint"], "strategy"):
        if group["strategy"] == "freeze":
            at_pct = [row for row in members if row["pct"] == pct]
            lines += [
                ([f"freeze {g['metric']} {pct:.0%}"], found)
                for g, found in groups(at_pct, "metric")
            ]
        else:
            lines.append(([group["strategy"]], members))
    lines += _joint_lines(rows, all_rows, params)
    return [
        "### Methods",
        "Memory is what a method keeps besides the network. Time is that of its training and of "
        "what it prepares, relative to fine-tuning's.",
        accuracy_table(
            ["method"], _present(lines), params.split.tasks, more=_costs(times), headings=_COSTS
        ),
        *_choices(choices),
    ]


_COSTS = ("memory (MB)", "time", "remark")


def _costs(times: dict[str, float]) -> Callable[[Sequence[str], Sequence[Row]], Sequence[str]]:
    def columns(_first: Sequence[str], rows: Sequence[Row]) -> Sequence[str]:
        known = [times[row["key"]] for row in rows if row["key"] in times]
        time = f"{sum(known) / len(known):.1f}x" if known else "–"
        sizes = [row["memory_bytes"] for row in rows if row["status"] == "done"]
        megabytes = f"{sum(sizes) / len(sizes) / 1e6:.2f}" if sizes else "–"
        return megabytes, time, STRATEGIES[rows[0]["strategy"]].remark

    return columns


def _choices(choices: dict[str, Any]) -> list[str]:
    """Return what was chosen for each method, and of how many trials."""
    lines = []
    for name, choice in choices.items():
        chosen = ", ".join(
            f"{key} {value:g}" + (" (at the edge of its grid)" if key in choice["at_edge"] else "")
            for key, value in choice["chosen"].items()
        )
        trials = str(len(choice["trials"])) if choice["trials"] else "none"
        lines.append([name, chosen, trials])
    return [
        "Hyperparameters, chosen by the mean accuracy on validation images of the first seed:",
        markdown(["method", "chosen", "trials"], lines),
    ]


def _joint_lines(
    rows: list[Row], all_rows: list[Row], params: Params
) -> list[tuple[list[str], list[Row]]]:
    """Return joint training's lines: under this head, and with one softmax of all classes.

    The mean of the latter is the plain average over all classes, the seed's number for joint
    training.
    """
    joint = [row | {"passes": row["hyper"]["passes"]} for row in _of(all_rows, "joint")]
    lines: list[tuple[list[str], list[Row]]] = []
    for group, members in groups(joint, "passes", "head"):
        length = f"joint, {group['passes'] * params.train.epochs:g} epochs"
        if group["head"] == rows[0]["head"]:
            lines.append(([length], members))
        elif group["head"] == "expanding":
            lines.append(([f"{length}, one softmax of all classes"], members))
    return lines


def _present(
    lines: list[tuple[list[str], list[Row]]],
) -> list[tuple[Sequence[str], Sequence[Row]]]:
    return [(first, members) for first, members in lines if members]


def _seed_column(
    figures: dict[str, tuple[str, str]],
) -> Callable[[Sequence[str], Sequence[Row]], Sequence[str]]:
    return lambda first, _rows: figures.get(first[0], ("–", "–"))


def _assumptions(params: Params) -> list[str]:
    """List what the seed does not say, where its figures are quoted."""
    if params.profile != "paper":
        return []
    model, train = params.model, params.train
    return [
        "## The seed's figures and what it does not say",
        f"Before the second task the seed reports {SEED_BEFORE[0]} on task 1 and {SEED_BEFORE[1]} "
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
    others = [_with_label(row, params) for row in mine if row["strategy"] != "freeze"]
    single = [_point(group, members) for group, members in groups(others, "label")]
    draw_trade_off(TRADE_OFF_PICTURE, points, single)
    save_json(
        TRADE_OFF_POINTS,
        [
            {
                "ranked_by": point["metric"],
                "frozen": point["pct"],
                "kept_task1": point["acc_task1"].mean,
                "learned_task2": point["acc_task2"].mean,
            }
            for point in points
        ],
    )


def _with_label(row: Row, params: Params) -> Row:
    passes = row["hyper"].get("passes")
    length = f", {passes * params.train.epochs:g} epochs" if passes else ""
    return row | {"label": f"{row['strategy']}{length}"}


def _point(group: Row, members: list[Row]) -> dict[str, Any]:
    return group | {name: measure(members, name) for name in ("acc_task1", "acc_task2")}


def _pictures(params: Params) -> dict[str, Path]:
    """Return the pictures for MLflow: place in the run to file."""
    pictures = {path.name: path for path in (TABLES, TRADE_OFF_PICTURE)}
    for seed in params.seeds:
        for stage, folder in (("saliency", SALIENCY_PICTURES), ("rank", RANK_PICTURES)):
            pictures[f"{stage}/{seed}.png"] = seed_file(folder, seed, ".png")
        for path in sorted((FILTER_PICTURES / str(seed)).glob("*.png")):
            pictures[f"filters/{seed}/{path.name}"] = path
    return pictures
