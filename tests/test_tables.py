"""Tables: numbers in percent, groups in order, and runs that cannot break out of the table."""

from permafrost.evaluation import Interval, share
from permafrost.tables import accuracy_table, groups, markdown, measure, percent


def test_percent():
    assert percent(Interval(0.712, 0.64, 0.784)) == "71.2 (64.0 to 78.4)"
    assert percent(Interval(-0.0251, -0.1, 0.05)) == "-2.5 (-10.0 to 5.0)"
    assert percent(Interval(0.5, None, None)) == "50.0"
    assert percent(Interval(0.0, 0.0, 0.0)) == "0.0 (0.0 to 0.0)"
    assert percent(None) == "–"
    assert percent(Interval(-0.0001, -0.0004, 0.0002)) == "0.0 (0.0 to 0.0)"


def test_share():
    assert [share(value) for value in (0.0, 0.07, 0.25, 0.125, 1.0)] == [
        "0%",
        "7%",
        "25%",
        "12.5%",
        "100%",
    ]


def test_measures_stay_within_what_is_possible():
    rows = [{"acc_task2": a, "forgetting": f} for a, f in ((0.85, 0.9), (1.0, 1.0), (0.97, 0.95))]
    accuracy, lost = measure(rows, "acc_task2"), measure(rows, "forgetting")
    assert 0 <= accuracy.low < accuracy.high <= 1
    assert -1 <= lost.low < lost.high <= 1
    assert measure([{"forgetting": -0.5}, {"forgetting": -0.25}], "forgetting").low >= -1


def test_measure():
    rows = [{"acc": 0.2, "bwt": None}, {"acc": 0.4}, {"acc": 0.0}]
    interval = measure(rows, "acc")
    assert round(interval.mean, 12) == 0.2
    assert interval.low < 0.2 < interval.high
    assert measure(rows, "bwt") is None
    assert measure([], "acc") is None
    assert measure([{"acc": 0.0}], "acc") == Interval(0.0, None, None)


def test_groups_keep_the_order_of_their_first_rows():
    rows = [
        {"strategy": "freeze", "pct": 0.5, "seed": 0},
        {"strategy": "finetune", "pct": None, "seed": 0},
        {"strategy": "freeze", "pct": 0.25, "seed": 0},
        {"strategy": "freeze", "pct": 0.5, "seed": 1},
    ]
    assert groups(rows, "strategy", "pct") == [
        ({"strategy": "freeze", "pct": 0.5}, [rows[0], rows[3]]),
        ({"strategy": "finetune", "pct": None}, [rows[1]]),
        ({"strategy": "freeze", "pct": 0.25}, [rows[2]]),
    ]
    assert groups([], "strategy") == []


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == (
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
    )


def test_markdown_is_escaped():
    table = markdown(["<script>alert('x')</script>"], [["a|b"], ["&lt;\nnew | line"]])
    assert "<" not in table
    assert "&lt;script&gt;alert('x')&lt;/script&gt;" in table
    lines = table.splitlines()
    assert len(lines) == 4
    assert lines[2] == "| a&#124;b |"
    assert lines[3] == "| &amp;lt; new &#124; line |"


def test_accuracy_table():
    row = {"acc_task1": 0.25, "acc_task2": 0.5, "acc_mean": 0.375, "forgetting": None}
    table = accuracy_table(["metric"], [(["mse"], [row]), (["random"], [])], 2)
    assert table.splitlines() == [
        "| metric | task 1 | task 2 | mean | forgetting |",
        "| --- | --- | --- | --- | --- |",
        "| mse | 25.0 | 50.0 | 37.5 | – |",
        "| random | – | – | – | – |",
    ]


def test_accuracy_table_with_further_columns():
    row = {"acc_task1": 0.25, "acc_task2": 0.5, "acc_mean": 0.375, "forgetting": None, "size": 3}
    table = accuracy_table(
        ["metric", "share"],
        [(["mse", "25%"], [row, row]), (["random", "50%"], [])],
        2,
        more=lambda first, rows: [" ".join(first), str(sum(row["size"] for row in rows))],
        headings=["name", "total size"],
    )
    assert table.splitlines() == [
        "| metric | share | task 1 | task 2 | mean | forgetting | name | total size |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| mse | 25% | 25.0 (25.0 to 25.0) | 50.0 (50.0 to 50.0) | 37.5 (37.5 to 37.5) | – "
        "| mse 25% | 6 |",
        "| random | 50% | – | – | – | – | random 50% | 0 |",
    ]
