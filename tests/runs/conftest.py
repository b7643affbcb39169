"""What tests of runs share: the inputs of small runs."""

import dataclasses

import pytest

from permafrost.experiment import RunInputs, new_network
from small_runs import make_knowledge, make_params, unread


@pytest.fixture
def inputs(make_sequence):
    """Return inputs without what stage consolidate writes."""
    first = new_network(make_params(), 0).state_dict()
    return RunInputs(make_sequence(validation=2), "tasks", first, "first", unread)


@pytest.fixture
def informed(inputs):
    """Return inputs with what stage consolidate writes."""
    network = new_network(make_params(), 0)
    known = make_knowledge(make_params(), inputs.tasks, network)
    return dataclasses.replace(inputs, read_knowledge=lambda: known)
