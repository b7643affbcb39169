"""Stage page: the whole experiment in one file of HTML."""

from typing import Any

from permafrost.artifacts import load_arrays, load_json, load_record, write_atomically
from permafrost.evaluation import share
from permafrost.page import charts, content, gallery
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.runs.stored import StoredRuns
from permafrost.stages.report import claims_of, labelled, refuse_failures, with_variant
from permafrost.stages.shared import (
    CLAIMS,
    FILTERS,
    FROZEN,
    PAGE,
    RANKS,
    SALIENCY,
    SECOND_RECORDS,
    STABILITY_TABLE,
    SWEEP,
    TABLES,
    TASKS,
    VARIANT,
    VARIANT_CURVES,
    open_stage,
    read_orders,
    seed_file,
    variant_pictures,
)
from permafrost.tables import Row
from permafrost.tracking import Tracker
from permafrost.variants import add_pictures


def run() -> None:
    """Write the page, and add it to the variant's run with the other pictures.

    Raises
    ------
    InputError
        If trainings of the sweep have failed; everything is written before, so that tables and page
        show them beside the others.
    """
    with open_stage("page") as params:
        write_atomically(PAGE, page(params).encode())
        add_pictures(Tracker(project_root()), load_record(VARIANT), variant_pictures(params))
        print(f"page: open {PAGE.resolve().as_uri()}")
    refuse_failures(load_record(SWEEP))


def page(params: Params) -> str:
    """Return the page of the results that lie there."""
    seed = params.seeds[0]
    summary = load_record(VARIANT)
    rows = with_variant(load_record(SWEEP), summary["seeds"])
    by_head = {head: [r for r in rows if r["head"] == head] for head in params.sweep.heads}
    tested = {head: claims_of(mine, params) for head, mine in by_head.items()}
    frozen = load_record(seed_file(FROZEN, seed, ".json"))["layers"]
    figures = _trade_offs(by_head, params)
    filters, about = load_arrays(seed_file(FILTERS, seed))
    layers = about["layers"]  # as they run
    return content.render(
        title=f"{params.split.datasets}, profile {params.profile}",
        verdicts=content.verdicts(tested),
        trade_offs=figures,
        seeds=len(params.seeds),
        tables=content.tables_as_html(TABLES.read_text()),
        claims=content.tables_as_html(CLAIMS.read_text()),
        stability=content.tables_as_html(STABILITY_TABLE.read_text()),
        variant=f"{share(params.freeze.pct)} frozen, ranked by {params.freeze.metric}",
        metric=params.freeze.metric,
        seed=seed,
        made_by=_made_by(summary["seeds"][0]["key"]),
        settings=content.settings_as_text(params.model_dump()),
        data={
            "figures": {f"trade-off-{head}": figure for head, figure in figures.items()}
            | {
                "epochs": charts.epochs(load_json(VARIANT_CURVES)),
                "drift": charts.drift(
                    layers,
                    [load_record(seed_file(SECOND_RECORDS, s, ".json")) for s in params.seeds],
                ),
                "forgetting": charts.forgetting(_done(by_head[params.sweep.heads[0]], params)),
                "capacity": charts.capacity(layers, frozen),
            },
            "gallery": _gallery(params, layers, frozen, filters),
            "downloads": content.downloads({"runs": rows, "epochs": load_json(VARIANT_CURVES)}),
        },
    )


def _trade_offs(by_head: dict[str, list[Row]], params: Params) -> dict[str, Any]:
    tasks = len(params.split.sizes)
    done = {head: _done(rows, params) for head, rows in by_head.items()}
    return {head: charts.trade_off(rows, tasks) for head, rows in done.items()}


def _done(rows: list[Row], params: Params) -> list[Row]:
    """Return finished runs, each with its method's name."""
    return labelled([row for row in rows if row["status"] == "done"], params)


def _gallery(
    params: Params, layers: list[str], frozen: dict[str, Any], filters: dict[str, Any]
) -> dict[str, Any]:
    """Return the gallery of the first seed's first task."""
    seed, metric = params.seeds[0], params.freeze.metric
    tasks, about = load_arrays(seed_file(TASKS, seed))
    images, labels = tasks["0/train/images"], tasks["0/train/labels"]
    maps, ranks = (load_arrays(seed_file(folder, seed))[0] for folder in (SALIENCY, RANKS))
    orders = read_orders(seed, metric)
    return {
        "sides": images.shape[2:],
        "classes": gallery.class_maps(images, labels, about["classes"][0], maps["maps"]),
        "layers": [
            gallery.layer_of_filters(
                name,
                orders[name],
                ranks[f"{metric}/{name}/scores"],
                frozen[name]["frozen"],
                filters[f"{name}/pictures"],
                filters[f"{name}/strongest"],
                images,
                (about["mean"], about["std"]),
            )
            for name in layers
        ],
    }


def _made_by(key: str) -> list[tuple[str, str]]:
    """Return the machine that made the variant's training, where that is stored."""
    stored = StoredRuns(project_root()).result(key)
    return list(stored["machine"].items()) if stored else []
