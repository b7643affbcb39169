"""The whole method: a network is ranked by what the criterion needs."""

from dataclasses import replace

import pytest
import torch

from permafrost.data import Batches
from permafrost.ranking import (
    RESPONSES,
    filter_responses,
    network_evidence,
    order_filters,
    score_filters,
)
from permafrost.ranking import method as ranking_method
from responding import hand_made_evidence


@pytest.mark.parametrize(
    "criterion",
    ["random", "magnitude", "bn_gamma", *(name for name in RESPONSES if name != "overlap")],
)
def test_later_tasks_are_ranked_by_what_the_criterion_needs(
    criterion, make_network, make_sequence, monkeypatch
):
    def refuse(*_args, **_options):
        raise AssertionError("maps were made for a criterion that looks at none")

    monkeypatch.setattr(ranking_method, "class_saliency", refuse)
    monkeypatch.setattr(ranking_method, "visualize_network", refuse)
    sequence, model = make_sequence(), make_network().view("shared", 0, 1)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    for aggregate in ("union", "combined"):
        config = ranking_method.ExplainConfig(aggregate=aggregate)
        orders = ranking_method.rank_network(
            model, batches, 2, sequence.normalization, criterion, config, 0
        )
        evidence = network_evidence(model, 0)
        if criterion in RESPONSES:
            scores = filter_responses(model, batches.ordered(64), 2, [criterion])
            evidence = replace(evidence, class_scores=scores)
        for layer, scores in score_filters(criterion, evidence).items():
            if aggregate == "combined":
                scores = scores.mean(1, keepdim=True)
            assert torch.equal(orders[layer], order_filters(scores, aggregate))


def test_combined_ranks_maps_against_one_map():
    evidence = hand_made_evidence()
    config = ranking_method.ExplainConfig(aggregate="combined")
    scores, orders = ranking_method.order_layers("mse", evidence, config)
    assert scores["conv"].shape == (3, 1)
    assert orders["conv"].tolist() == [2, 1, 0]
    # Each class by itself: filter 1 is class 0's map.
    _, orders = ranking_method.order_layers("mse", evidence, replace(config, aggregate="union"))
    assert orders["conv"].tolist()[0] == 1


def test_later_tasks_are_explained_where_a_criterion_needs_class_maps(
    make_network, make_sequence, monkeypatch
):
    def refuse(*_args, **_options):
        raise AssertionError("pictures were made for a criterion that looks at none")

    monkeypatch.setattr(ranking_method, "visualize_network", refuse)
    sequence, model = make_sequence(), make_network().view("shared", 0, 1)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    config = ranking_method.ExplainConfig()
    orders = ranking_method.rank_network(
        model, batches, 2, sequence.normalization, "overlap", config, 0
    )
    maps = ranking_method.explain_classes(model, batches.ordered(64), 2, config).maps
    scores = filter_responses(model, batches.ordered(64), 2, ["overlap"], maps)
    for layer, values in scores["overlap"].items():
        assert torch.equal(orders[layer], order_filters(values, "union"))


def test_pictures_of_several_starts_are_averaged(make_network, make_sequence):
    sequence, model = make_sequence(), make_network().view("shared", 0, 1)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    config = ranking_method.ExplainConfig(steps=2, start_seed=3)

    def made(**options):
        return ranking_method.visualize_network(
            model, (32, 32), sequence.normalization, replace(config, **options), batches
        )

    both, apart = made(starts=2), [made(), made(start_seed=4)]
    for place in (0, 1):  # pictures and maps
        for name, values in both[place].items():
            torch.testing.assert_close(values, (apart[0][place][name] + apart[1][place][name]) / 2)
    pictures, maps = made(pictures="natural")
    grown, _ = apart[0]
    assert {n: p.shape for n, p in pictures.items()} == {n: p.shape for n, p in grown.items()}
    for name, values in pictures.items():
        assert torch.equal(maps[name], values.abs().mean(1))
