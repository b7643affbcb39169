"""The report: what its sentences say of the numbers, and the plot's lines."""

import json
from dataclasses import asdict

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer

from permafrost import plots
from permafrost.evaluation import Interval, confidence_interval
from permafrost.params import Params
from permafrost.plots import draw_trade_off
from permafrost.stages import report
from permafrost.stages.evaluate import summarise
from permafrost.stages.report import comparison, tables
from permafrost.tables import percent

CHOICES = {"shared": {"freeze": {"chosen": {"pct": 0.125}, "trials": [], "at_edge": []}}}


def row(seed: int, strategy: str = "freeze", **more) -> dict:
    own = {"metric": "mse", "pct": 0.125} if strategy == "freeze" else {"metric": None, "pct": None}
    return {
        "key": f"{strategy} {seed}",
        "strategy": strategy,
        "seed": seed,
        "head": "shared",
        "hyper": {},
        "status": "done",
        "memory_bytes": 10**6,
        "free_filters": 0.875,
        "free_filters_least": 0.8,
        "acc_task1": (0.85, 1.0, 0.97)[seed],
        "acc_task2": 0.5,
        "acc_mean": 0.7,
        "forgetting": 0.1,
        **own,
        **more,
    }


def written(seeds: list[int], trials: int = 0, **more) -> str:
    tried = [{"hyper": {"pct": 0.125}}] * trials
    choices = {"shared": {"freeze": {"chosen": {"pct": 0.125}, "trials": tried, "at_edge": []}}}
    rows = [row(seed, name) for seed in seeds for name in ("freeze", "finetune")]
    return tables(rows, Params(seeds=seeds, **more), choices)


def test_one_seed_has_no_brackets_and_no_word_of_them():
    text = written([0])
    assert "interval" in text
    assert "without an interval" in text
    assert "brackets" not in text
    assert " to " not in text


def test_free_filters_are_told():
    assert "| 1.00 | 88%, 80% |" in written([0])


def test_intervals_are_named():
    text = written([0, 1, 2])
    assert "mean over the seeds (0, 1, 2) and, in brackets, its 95% interval by Student's t" in text
    assert "on the logit scale" in text
    for figure in text.replace("(", "|").replace(")", "|").split("|"):
        if " to " in figure and len(figure) < 20:
            assert all(0 <= float(bound) <= 100 for bound in figure.split(" to ")), figure


def test_what_is_chosen_by_no_trial_is_not_called_chosen():
    text = written([0, 1])
    assert "as declared; none was chosen" in text
    assert "validation" not in text
    text = written([0, 1], trials=3)
    assert "validation images of the first seed" in text
    assert "| freeze | pct 0.125 | 3 |" in text


def test_no_column_of_times():
    assert "time" not in written([0, 1]).lower()


def test_shares_are_not_rounded():
    assert "| 12.5% |" in written([0, 1])
    assert "freeze mse 12.5%" in written([0, 1])


def test_the_variants_intervals_stay_within_what_is_possible():
    rows = [row(seed, acc_task1_before=1.0) for seed in range(3)]
    summary = summarise(rows, Params(seeds=[0, 1, 2]))
    assert 0 <= summary["acc_task1"]["low"] < summary["acc_task1"]["high"] <= 1
    assert json.dumps(summary, allow_nan=False)


def test_the_comparison_holds_the_tables_numbers():
    seeds = [0, 1, 2]
    rows = [row(seed, name) for seed in seeds for name in ("freeze", "finetune", "ewc")]
    joint = {"head": "expanding", "hyper": {"passes": 2}}
    rows += [row(seed, "joint", **joint) for seed in seeds[:1]]
    rows[2] |= {"status": "failed", "error": "the loss is nan", "acc_mean": None}
    compared = comparison(rows, Params(seeds=seeds, train={"epochs": 10}))
    shared, frozen = compared["shared"], compared["shared"]["freeze"]["mse"]["12.5%"]
    assert list(frozen) == ["acc_task1", "acc_task2", "acc_mean", "forgetting", "seeds"]
    interval = confidence_interval([0.85, 1.0, 0.97])
    assert frozen["acc_task1"] == shared["finetune"]["acc_task1"] == asdict(interval)
    assert f"| 12.5% | {percent(interval)} |" in written(seeds)
    assert [shared[name]["seeds"] for name in ("finetune", "ewc")] == [3, 2]
    assert compared["expanding"]["joint"]["20 epochs"]["acc_task1"]["low"] is None
    assert json.dumps(compared, allow_nan=False)


def three_tasks(**more) -> str:
    rows = [row(0, acc_task3=0.25, R=[[]] * 3 + [[0.85, 0.5, 0.25]])]
    split = {"tasks": 3, "classes_per_task": 3}
    return tables(rows, Params(seeds=[0], split=split, **more), CHOICES)


def test_the_tables_of_three_tasks():
    text = three_tasks()
    assert "| task 1 | task 2 | task 3 | mean | forgetting |" in text
    assert "| 85.0 | 50.0 | 25.0 | 70.0 | 10.0 |" in text
    assert "on the earlier tasks lie below their best, mean over these tasks" in text
    assert "task 1 has lost" not in text + written([0])


def test_the_posts_two_tasks_are_not_set_beside_three():
    assert "post: task 1" not in three_tasks(profile="paper")
    assert "the post reports" not in three_tasks(profile="paper")
    assert "post: task 1" in written([0], profile="paper")
    assert "the post reports" in written([0], profile="paper")


def test_the_plot_of_three_tasks(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "TRADE_OFF_POINTS", tmp_path / "points.json")
    params = Params(seeds=[0], split={"tasks": 3, "classes_per_task": 3})
    more = {"acc_task3": 0.25, "R": [[]] * 3 + [[0.75, 0.5, 0.25]]}
    rows = [row(0, **more), row(1, **more), row(0, "finetune", **more)]
    report._draw(rows, params)
    ends = {"kept": 0.625, "learned": 0.25}
    tuned = "finetune (1 seed)"  # where the others are of two
    assert json.loads((tmp_path / "points.json").read_text()) == [
        {"method": "freeze mse", "frozen": 0.125, "name": "freeze mse 12.5%", **ends, "seeds": 2},
        {"method": tuned, "frozen": None, "name": tuned, **ends, "seeds": 1},
    ]
    axis = drawn.figures[-1].axes[0]
    assert axis.get_xlabel() == "learned: accuracy on task 3, %"
    assert axis.get_ylabel() == "kept: mean accuracy on tasks 1 to 2, %"
    for line in axis.containers:
        assert line[0].get_xydata().tolist() == [[25.0, 62.5]]


def test_the_plot_of_two_tasks_names_them(drawn):
    axis = drawn([], [point(1, label="x")]).axes[0]
    assert axis.get_xlabel() == "learned: accuracy on task 2, %"
    assert axis.get_ylabel() == "kept: accuracy on task 1, %"


@pytest.fixture
def drawn(monkeypatch):
    """Return what draws a plot and returns its axis."""
    figures = []
    monkeypatch.setattr(plots, "save_for_papers", lambda figure, _path: figures.append(figure))

    def draw(points, single, tasks=2):
        draw_trade_off(None, points, single, tasks, "digits, head shared, 3 seeds")
        return figures[-1]

    draw.figures = figures
    return draw


def point(number: int, *values: float, **more) -> dict:
    interval = confidence_interval(values or [0.01 * number])
    return {"kept": interval, "learned": interval, **more}


@pytest.mark.parametrize(("lines", "others"), [(1, 2), (4, 10), (10, 20), (0, 13), (0, 14)])
def test_every_line_is_drawn_and_named(drawn, lines, others):
    points = [point(n, metric=f"m{n}", pct=pct) for n in range(lines) for pct in (0.25, 0.5)]
    figure = drawn(points, [point(n, label=f"s{n}") for n in range(others)])
    bars = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    looks = {(c[0].get_color(), c[0].get_marker(), c[0].get_linestyle()) for c in bars}
    assert len(looks) == len(bars) == lines + others
    names = [f"m{n}" for n in range(lines)] + [f"s{n}" for n in range(others)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_the_legend_hides_no_line(drawn):
    figure = drawn([], [point(n, label=f"strategy {n}, 20 epochs") for n in range(30)])
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert not legend.overlaps(figure.axes[0].get_window_extent())
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= figure.bbox.y0


def test_bars_are_the_intervals(drawn):
    interval = Interval(0.9, 0.0, 0.95)
    figure = drawn([], [{"label": "x", "kept": interval, "learned": interval}])
    across, up = figure.axes[0].containers[0][2]
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([0, 95])
    assert up.get_segments()[0][:, 1].tolist() == pytest.approx([0, 95])
    assert "95% intervals" in figure.axes[0].get_title()


def test_one_seed_has_no_bars_and_no_word_of_them(drawn):
    title = drawn([], [point(1, label="x")]).axes[0].get_title()
    assert title == "Kept and learned\ndigits, head shared, 3 seeds"


def test_joint_training_of_fewer_seeds_says_so():
    rows = [row(seed, "finetune") for seed in (0, 1, 2)]
    rows += [row(0, "joint", hyper={"passes": 2})]
    text = tables(rows, Params(seeds=[0, 1, 2]), CHOICES)
    assert ["(1 seed)" in line for line in text.splitlines() if "joint" in line] == [True] * 2


def test_twins_are_lines_of_their_own_and_paired_by_seed():
    """Seed 2 has no twin, and so counts in no difference."""
    rows = [
        row(
            seed,
            "soft",
            metric="mse",
            acc_task1=0.6 + seed / 10,
            controlled_by=[f"soft mse twin by chance shared seed {seed}"],
        )
        for seed in (0, 1, 2)
    ]
    rows += [
        row(seed, "soft", metric="mse", twin="chance", acc_task1=0.5 + seed / 10) for seed in (0, 1)
    ]
    text = tables(rows, Params(seeds=[0, 1, 2], sweep={"twins": True}), CHOICES)
    assert "| soft | chance | 10.0 (10.0 to 10.0) | 0.0 (0.0 to 0.0) | 0.0 (0.0 to 0.0) |" in text
    assert "\n| soft, twin by chance | 55.0 " in text
    assert "\n| soft | 70.0 " in text
    compared = comparison(rows, Params(seeds=[0, 1, 2]))["shared"]
    assert compared["soft, twin by chance"]["seeds"] == 2
    assert "its twin" not in tables(rows, Params(seeds=[0, 1, 2]), CHOICES)
