"""Responses and BatchNorm's gammas as criteria."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from permafrost.errors import InputError
from permafrost.ranking import (
    CONTROLS,
    METRICS,
    RESPONSES,
    check_criterion,
    needs_maps,
    network_evidence,
    order_filters,
    score_filters,
)
from responding import CLASSES, respond, small_network


def test_kinds_of_criteria():
    assert not set(METRICS) & set(CONTROLS) | set(CONTROLS) & set(RESPONSES)
    assert needs_maps("mse")
    assert needs_maps("custom.centre_distance:centre_distance")
    for name in (*CONTROLS, *RESPONSES):
        check_criterion(name)
        assert not needs_maps(name)


def test_response_criteria_rank_by_their_class_scores():
    model = small_network()
    evidence = replace(network_evidence(model, 0), class_scores=respond(model))
    for criterion in RESPONSES:
        scores = score_filters(criterion, evidence)
        assert list(scores) == list(evidence.weights)
        for layer, values in scores.items():
            assert torch.equal(values, evidence.class_scores[criterion][layer])
            assert order_filters(values)[0] == values[:, 0].argmax()


def test_response_criteria_need_class_scores():
    evidence = network_evidence(small_network(), 0)
    partial = replace(evidence, class_scores={"taylor": {"0": torch.ones(3, CLASSES)}})
    for unusable in (evidence, partial):
        with pytest.raises(InputError, match="'taylor' gave no class scores of layer '0'"):
            score_filters("taylor", unusable)


def test_bn_gamma_is_the_size_of_gamma():
    model = small_network()
    scores = score_filters("bn_gamma", network_evidence(model, 0))
    for conv, norm in (("0", 1), ("4", 5), ("8", 9)):
        expected = model[norm].weight.detach().abs().float()[:, None]
        assert (model[norm].weight < 0).any()
        assert torch.equal(scores[conv], expected)
        assert not scores[conv].requires_grad


def test_bn_gamma_without_batch_norm():
    partly = small_network()
    partly[5] = nn.Identity()
    without_gamma = small_network()
    without_gamma[5] = nn.BatchNorm2d(6, affine=False).double()
    for model, layer in ((small_network(batch_norm=False), 0), (partly, 4), (without_gamma, 4)):
        with pytest.raises(InputError, match=f"'bn_gamma' needs a BatchNorm .* layer {layer} has"):
            score_filters("bn_gamma", network_evidence(model, 0))
