"""Evidence: which filters run, where their maps are read, and one map of all classes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

from permafrost.errors import InputError
from permafrost.ranking import (
    CONTROLS,
    RESPONSES,
    FilterRelevance,
    combine_classes,
    network_evidence,
    order_filters,
    score_filters,
)
from responding import (
    CLASSES,
    Head,
    hand_made_evidence,
    kept_logits,
    labelled_images,
    respond,
    small_network,
)

# Which module a filter's feature map is read from


class Grouped(nn.Module):
    """Norms are registered behind all convolutions; one head runs in training only."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.second, self.first = nn.Conv2d(6, 6, 3), nn.Conv2d(3, 6, 3)
        self.auxiliary = nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList([norm(6), norm(6)])
        self.head = nn.Linear(6, CLASSES)
        for module in self.norms:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        self.double().eval()

    def forward(self, x):
        x = F.relu(self.norms[0](self.first(x)))
        if self.training:
            self.auxiliary(x)
        self.maps = self.norms[1](self.second(x))
        return self.head(F.relu(self.maps).mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_feature_maps_lie_behind_the_norm_of_the_data_flow(norm):
    model, (images, labels) = Grouped(norm), labelled_images()
    scores = respond(model)
    model(images)
    maps = model.maps.detach().abs().mean((2, 3))
    expected = torch.stack([maps[labels == label].mean(0) for label in range(CLASSES)], 1)
    torch.testing.assert_close(scores["activation"]["second"], expected, rtol=1e-8, atol=1e-12)
    kept = kept_logits(model, images, labels)
    expected = torch.stack([kept[labels == label].mean() for label in range(CLASSES)])
    torch.testing.assert_close(scores["relevance"]["second"].sum(0), expected)
    gammas = network_evidence(model, 0).gammas
    assert torch.equal(gammas["second"], model.norms[1].weight.detach())
    for layers in scores.values():
        assert list(layers) == ["first", "second"]  # as they run


def test_what_does_not_run_is_no_filter():
    model = Grouped()
    evidence = network_evidence(model, 0)
    assert sorted(evidence.weights) == ["first", "second"]
    evidence = replace(evidence, class_scores=respond(model))
    for criterion in (*CONTROLS, *RESPONSES):
        assert sorted(score_filters(criterion, evidence)) == ["first", "second"]


def test_what_the_logits_do_not_depend_on_counts_nothing():
    class Idle(Head):
        def forward(self, x):
            self.idle = self.behind(x)
            return self.head(F.relu(self.conv(x)).mean((2, 3)))

    scores = respond(Idle(nn.Conv2d(3, 5, 1)))
    for criterion in ("taylor", "fisher", "relevance"):
        assert torch.equal(scores[criterion]["behind"], torch.zeros(5, CLASSES).double())
    assert (scores["activation"]["behind"] > 0).all()


def test_a_norm_that_contains_its_activation():
    class ActiveNorm(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    model, plain = Grouped(ActiveNorm), Grouped()
    images, labels = labelled_images()
    found, expected = respond(model), respond(plain)
    plain(images)
    maps = plain.maps.detach().relu().mean((2, 3))
    active = torch.stack([maps[labels == label].mean(0) for label in range(CLASSES)], 1)
    torch.testing.assert_close(found["activation"]["second"], active, rtol=1e-8, atol=1e-12)
    for layer, values in expected["relevance"].items():
        torch.testing.assert_close(found["relevance"][layer], values, rtol=1e-8, atol=1e-12)


def test_a_network_that_cannot_be_followed():
    class Picky(nn.Sequential):
        def forward(self, x):
            assert x.shape[1] == 3
            assert x.shape[2:] == (9, 10)
            return super().forward(x)

    model = Picky(*small_network())
    evidence = network_evidence(model, 0)
    for criterion in ("random", "magnitude"):
        assert list(score_filters(criterion, evidence)) == ["0", "4", "8"]
    with pytest.raises(InputError, match="'bn_gamma' needs a BatchNorm"):
        score_filters("bn_gamma", evidence)
    for criterion, layers in respond(model).items():
        for layer, values in layers.items():
            assert torch.equal(values, respond(small_network(), [criterion])[criterion][layer])


DERIVED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm parametrization": nn.utils.parametrizations.weight_norm,
    "spectral_norm parametrization": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, that some of these are old
@pytest.mark.parametrize("kind", DERIVED)
def test_magnitude_is_that_of_the_weights_that_run(kind):
    def network(seed):
        torch.manual_seed(seed)
        body = [DERIVED[kind](nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, CLASSES)).double()

    model, other = network(0).eval(), network(1).eval()
    model.load_state_dict(other.state_dict())
    state = copy.deepcopy(model.state_dict())
    found = network_evidence(model.train(), 0).weights["0"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    images, labels = labelled_images()
    model.eval()(images)
    torch.testing.assert_close(found, model[0].weight.detach())
    # The copy that relevance works on has the derived weights too.
    values = FilterRelevance(model)(images, labels)["0"].sum(1)
    kept = (model(images) - model[4].bias).gather(1, labels[:, None])[:, 0].detach()
    torch.testing.assert_close(values, kept, rtol=1e-8, atol=1e-12)


# One map of all classes


def test_combined_maps_and_scores():
    evidence = hand_made_evidence()
    combined = combine_classes(evidence)
    # Means 0, 0.5, 0.6 and 0.1 / 3.
    expected = torch.tensor([[[0, 0.5 / 0.6], [1, 0.1 / 1.8]]])
    torch.testing.assert_close(combined.class_maps, expected)
    assert combined.class_scores["taylor"]["conv"].tolist() == [[3], [3], [2]]
    assert combined.weights is evidence.weights
    assert combined.filter_maps is evidence.filter_maps
    assert (combined.seed, combined.gammas) == (4, evidence.gammas)
    # Filter 2 lights up where the combined map does most, filter 0 where it is dark.
    order = order_filters(score_filters("mse", combined)["conv"], "combined")
    assert order.tolist() == [2, 1, 0]
    order = order_filters(score_filters("taylor", combined)["conv"], "combined")
    assert order.tolist() == [0, 1, 2]


def test_combined_maps_without_contrast_or_without_maps():
    complements = replace(hand_made_evidence(), class_maps=torch.eye(2)[:, None])
    assert torch.equal(combine_classes(complements).class_maps, torch.zeros(1, 1, 2))
    assert combine_classes(replace(complements, class_maps=None)).class_maps is None


def test_combined_maps_that_are_not_finite():
    maps = hand_made_evidence().class_maps.clone()
    maps[1, 0, 0] = math.nan
    combined = combine_classes(replace(hand_made_evidence(), class_maps=maps))
    with pytest.raises(ValueError, match="not finite"):
        score_filters("mse", combined)


def test_combined_orders_take_one_score_per_filter():
    with pytest.raises(ValueError, match=r"'combined' needs scores \(F, 1\), not \(3, 2\)"):
        order_filters(torch.ones(3, 2), "combined")
    assert order_filters(torch.tensor([[1.0], [3], [2]]), "combined").tolist() == [1, 2, 0]
