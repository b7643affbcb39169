"""Criteria that explain filters, each against a loop over single images and filters."""

import pytest
import torch
from captum.attr import LayerConductance
from torch import nn
from torch.nn import functional as F

from permafrost.explain import fullgrad
from permafrost.ranking import FilterRelevance, filter_responses
from permafrost.ranking.ablation import first_of_each_class
from permafrost.ranking.features import feature_layers
from permafrost.ranking.paths import filter_conductance
from responding import (
    CLASSES,
    class_maps,
    in_batches,
    labelled_images,
    naive_maps,
    respond,
    small_network,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def each_image(model, explain):
    """Return numbers (N, F) of each layer: what `explain` gives of a map and its gradient."""
    images, labels = labelled_images()
    found = []
    for image, label in zip(images, labels.tolist(), strict=True):
        maps, logits = naive_maps(model, image)
        found.append(explain(maps, logits[0], label))
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def class_mean(values):
    _, labels = labelled_images()
    return torch.stack([values[labels == label].mean(0) for label in range(CLASSES)], dim=1)


def effects(maps, explained):
    gradients = torch.autograd.grad(explained, list(maps.values()))
    return {
        name: torch.stack([(a * g).sum() for a, g in zip(map_[0], gradient[0], strict=True)])
        for (name, map_), gradient in zip(maps.items(), gradients, strict=True)
    }


def of_logit(maps, logits, label):
    return effects(maps, logits[label])


def of_loss(maps, logits, label):
    return effects(maps, -logits.log_softmax(0)[label])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_criteria_of_maps_and_gradients(batch_norm):
    model = small_network(batch_norm)
    found = respond(model, ["attribution", "contrast", "taylor_signed", "gradient"])
    sizes = {
        name: map_[0, 0].numel()
        for name, map_ in naive_maps(model, labelled_images()[0][0])[0].items()
    }
    for name, values in each_image(model, of_logit).items():
        attribution, signed = class_mean(values.abs()), class_mean(values)
        torch.testing.assert_close(found["attribution"][name], attribution, **EXACT)
        expected = torch.stack(
            [(signed[:, c] - signed.sum(1) / CLASSES).abs() for c in range(CLASSES)], dim=1
        )
        torch.testing.assert_close(found["contrast"][name], expected, **EXACT)
    for name, values in each_image(model, of_loss).items():
        expected = class_mean(values / sizes[name]).abs()
        torch.testing.assert_close(found["taylor_signed"][name], expected, **EXACT)


def test_gradient_is_in_means_of_its_layer():
    model = small_network()

    def squares(maps, logits, label):
        loss = -logits.log_softmax(0)[label]
        gradients = torch.autograd.grad(loss, list(maps.values()))
        return {n: (g[0] ** 2).sum((1, 2)) for n, g in zip(maps, gradients, strict=True)}

    found = respond(model, ["gradient"])["gradient"]
    for name, values in each_image(model, squares).items():
        means = class_mean(values)
        torch.testing.assert_close(found[name], means / means.mean(0), **EXACT)
        torch.testing.assert_close(found[name].mean(0), torch.ones(CLASSES).double())


def test_a_layer_that_the_loss_does_not_see_has_no_gradient():
    model = small_network()
    nn.init.zeros_(model[-1].weight)
    assert not respond(model, ["gradient"])["gradient"]["0"].any()


def test_conductances_of_a_layer_sum_to_what_the_logit_gains():
    model = small_network()
    images, labels = labelled_images()
    layers = feature_layers(model, images[:1])
    logits = model(images).gather(1, labels[:, None])[:, 0]
    base = model(torch.zeros_like(images)).gather(1, labels[:, None])[:, 0]
    for steps, tolerance in ((20, 0.05), (2000, 1e-4)):
        for values in filter_conductance(model, layers, images, labels, steps).values():
            gained = (logits - base).detach()
            torch.testing.assert_close(values.sum(1), gained, rtol=tolerance, atol=tolerance)


def test_conductance_is_captums():
    model = small_network()
    images, labels = labelled_images(4)
    layers = feature_layers(model, images[:1])
    ours = filter_conductance(model, layers, images, labels, 2000)
    # Captum hooks modules, and an in-place ReLU would write over what they gave.
    for module in model:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for name, module in layers.items():
        theirs = LayerConductance(model, model.get_submodule(module)).attribute(
            images, target=labels, n_steps=2000, method="riemann_trapezoid"
        )
        torch.testing.assert_close(ours[name], theirs.sum((2, 3)), rtol=1e-3, atol=1e-4)


def test_conductance_scores_its_size():
    model = small_network()
    images, labels = labelled_images()
    values = filter_conductance(model, feature_layers(model, images[:1]), images, labels)
    for name, scores in respond(model, ["conductance"])["conductance"].items():
        torch.testing.assert_close(scores, class_mean(values[name].abs()), **EXACT)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_fullgrads_terms(batch_norm):
    model = small_network(batch_norm)

    def terms(maps, logits, label):
        gradients = torch.autograd.grad(logits[label], list(maps.values()))
        found = {}
        for (name, _), gradient in zip(maps.items(), gradients, strict=True):
            conv = model.get_submodule(name)
            size = gradient[0].abs().sum((1, 2))
            if not batch_norm:
                found[name] = size * conv.bias.abs()
                continue
            norm = model[int(name) + 1]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            implicit = norm.bias - scale * norm.running_mean
            found[name] = size * ((scale * conv.bias).abs() + implicit.abs())
        return found

    found = respond(model, ["fullgrad_terms"])["fullgrad_terms"]
    for name, values in each_image(model, terms).items():
        torch.testing.assert_close(found[name], class_mean(values.detach()), **EXACT)
    assert fullgrad(model, *labelled_images()).isfinite().all()  # the model is as it was


def test_overlap_correlates_mean_responses_with_class_maps():
    model = small_network()
    images, labels = labelled_images()
    maps = [naive_maps(model, image)[0] for image in images]
    for name, scores in respond(model, ["overlap"])["overlap"].items():
        for label in range(CLASSES):
            mine = [m[name][0] for m, y in zip(maps, labels.tolist(), strict=True) if y == label]
            mean = torch.stack(mine).mean(0).detach()
            large = F.interpolate(mean[None], (9, 10), mode="bilinear")[0].flatten(1)
            target = class_maps()[label].flatten()
            expected = [torch.corrcoef(torch.stack([f, target]))[0, 1] for f in large]
            torch.testing.assert_close(
                scores[:, label], torch.stack(expected), rtol=1e-4, atol=1e-5
            )


def test_overlap_needs_class_maps():
    images, labels = labelled_images()
    with pytest.raises(ValueError, match="'overlap' needs class maps"):
        filter_responses(small_network(), [(images, labels)], CLASSES, ["overlap"])


class Chained(nn.Module):
    """A network that is no chain."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def with_one_relu(model):
    """Return the network with a single ReLU, which stands in several places."""
    relu = nn.ReLU()
    return nn.Sequential(*(relu if isinstance(m, nn.ReLU) else m for m in model))


@pytest.mark.parametrize("make", [small_network, lambda: with_one_relu(small_network())])
@pytest.mark.parametrize("wrap", [lambda model: model, Chained, nn.Sequential])
def test_ablation_silences_filter_by_filter(wrap, make):
    model = make()
    images, labels = labelled_images()
    found = filter_responses(wrap(model), in_batches(images, labels), CLASSES, ["ablation"])[
        "ablation"
    ]
    whole = F.cross_entropy(model(images), labels, reduction="none")
    layers = feature_layers(model, images[:1])
    for name, scores in zip(layers, found.values(), strict=True):
        module = model.get_submodule(layers[name])
        for index in range(len(scores)):

            def silence(_module, _inputs, output, index=index):
                keep = torch.ones(output.shape[1], 1, 1, dtype=output.dtype)
                keep[index] = 0
                return output * keep

            handle = module.register_forward_hook(silence)
            growth = F.cross_entropy(model(images), labels, reduction="none") - whole
            handle.remove()
            torch.testing.assert_close(
                scores[index], class_mean(growth.detach()[:, None])[0], **EXACT
            )


def test_ablation_looks_at_the_first_images_of_each_class():
    images = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 3, 2, 2)
    labels = torch.tensor([0, 0, 0, 1, 0, 2, 1, 1, 2, 0, 2, 1])
    chosen = list(first_of_each_class(in_batches(images, labels, 5), 3, count=6))
    assert torch.cat([x[:, 0, 0, 0] for x, _ in chosen]).tolist() == [0, 1, 3, 5, 6, 8]
    assert torch.cat([y for _, y in chosen]).tolist() == [0, 0, 1, 2, 1, 2]


def test_normalized_relevance_is_each_images_share():
    model = small_network()
    images, labels = labelled_images()
    found = respond(model, ["relevance_normalized"])["relevance_normalized"]
    for name, values in FilterRelevance(model)(images, labels).items():
        shares = torch.stack([one / one.abs().sum() for one in values])
        torch.testing.assert_close(found[name], class_mean(shares), rtol=1e-6, atol=1e-9)
