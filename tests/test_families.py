"""docs/networks.md: what holds of torchvision's networks, three of them in every run.

``--networks``, as in ``make networks``, measures all of them and writes the table.
"""

import pytest

from families import EVERYDAY, RIGHT, SIDES, is_worse, measure, read_table, write_table


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        every = metafunc.config.getoption("--networks")
        metafunc.parametrize("family", SIDES if every else EVERYDAY)


def test_the_table_holds(family, request):
    row, table = measure(family), read_table()
    before = table.get(family, {})
    worse = {
        column: f"{before[column]} -> {found}"
        for column, found in row.items()
        if column in before and is_worse(found, before[column])
    }
    assert not worse, f"{family}: {worse}"
    if request.config.getoption("--networks"):
        write_table(table | {family: row})
    else:
        assert row == before, "better than the table says: make networks"


def test_the_table_names_every_network():
    assert list(read_table()) == list(SIDES)


@pytest.mark.parametrize(
    ("found", "before", "worse"),
    [
        (RIGHT, "refused", False),
        (RIGHT, "5e-02 missing", False),
        ("refused", "refused", False),
        ("4e-02 missing", "5e-02 missing", False),
        ("6e-02 missing", "5e-02 missing", True),
        ("refused", RIGHT, True),
        ("5e-02 missing", RIGHT, True),
        ("off by 1e-01", "refused", True),
        ("refused", "5e-02 missing", True),
    ],
)
def test_a_cell_may_only_get_better(found, before, worse):
    assert is_worse(found, before) == worse
