"""The VGG family: torchvision's layers, seeded weights, and which head answers."""

import copy
import math

import pytest
import torch
from torch import nn

from permafrost.errors import InputError
from permafrost.strategies import Finetune, Learner, Progress
from permafrost.training import TrainingConfig

LETTERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("arch", list(LETTERS))
def test_features_are_torchvisions(make_network, arch, batch_norm):
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):  # only structure and shapes are compared
        ours = make_network(arch, width=1, batch_norm=batch_norm).features
        theirs = make_layers(cfgs[LETTERS[arch]], batch_norm)
    assert str(ours) == str(theirs)
    assert shapes(ours) == shapes(theirs)


def test_small_features_compute_what_torchvisions_do(make_network):
    from torchvision.models.vgg import make_layers

    ours = make_network(width=0.05).features.eval()
    theirs = make_layers([3, "M", 6, "M", 13, 13, "M", 26, 26, "M", 26, 26, "M"], True).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert ours(images).shape == (2, 26, 1, 1)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("width", "filters"),
    [
        (0.1, [6, 13, 26, 26, 51, 51, 51, 51]),
        (0.5, [32, 64, 128, 128, 256, 256, 256, 256]),
        (2, [128, 256, 512, 512, 1024, 1024, 1024, 1024]),
        (0.001, [1] * 8),
    ],
)
def test_width_scales_every_layer_and_leaves_at_least_one_filter(make_network, width, filters):
    with torch.device("meta"):
        network = make_network(width=width)
    assert [layer.out_channels for layer in convolutions(network)] == filters
    assert [head.in_features for head in network.heads] == [filters[-1]] * 2


def test_weights_depend_on_the_seed_only(make_network, same_bits):
    torch.manual_seed(1)
    first = make_network(seed=3).state_dict()
    torch.manual_seed(2)
    assert same_bits(first, make_network(seed=3).state_dict())
    other = make_network(seed=4).state_dict()
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])
    assert not torch.equal(first["heads.0.weight"], other["heads.0.weight"])
    assert not torch.equal(first["heads.0.weight"], first["heads.1.weight"])


def test_features_do_not_depend_on_the_number_of_tasks(make_network, same_bits):
    two, three = make_network(tasks=2), make_network(tasks=3)
    assert same_bits(two.features.state_dict(), three.features.state_dict())
    assert len(three.heads) == 3


def test_first_heads_do_not_depend_on_the_number_of_tasks(make_network, same_bits):
    two, three = make_network(tasks=2), make_network(tasks=3)
    assert same_bits(two.heads.state_dict(), three.heads[:2].state_dict())


def test_the_global_generator_is_left_alone(make_network):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_network()
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_drawn_as_torchvision_draws_them(make_network):
    network = make_network(width=0.5, classes=20)
    for layer in convolutions(network)[3:]:
        assert layer.weight.std().item() == pytest.approx(
            math.sqrt(2 / (9 * layer.out_channels)), rel=0.02
        )
        assert not layer.bias.any()
    head = network.heads[0]
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.bias.any()


def test_views_share_their_parameters(make_network):
    network = make_network()
    own = {id(parameter) for parameter in network.parameters()}
    for head in ("shared", "multi", "expanding"):
        assert {id(p) for p in network.view(head, 1, 2).parameters()} <= own
    network.view("multi", 1, 2)[-1].bias.data.fill_(7)
    assert network.heads[1].bias.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("head", "task", "seen", "answering"),
    [
        ("shared", 0, 1, [0]),
        ("shared", 2, 3, [0]),
        ("multi", 0, 3, [0]),
        ("multi", 2, 1, [2]),
        ("expanding", 0, 1, [0]),
        ("expanding", 0, 2, [0, 1]),
        ("expanding", 1, 3, [0, 1, 2]),
    ],
)
def test_which_heads_answer(make_network, head, task, seen, answering):
    network = make_network(tasks=3).eval()
    for index, layer in enumerate(network.heads):
        layer.bias.data = torch.tensor([10.0 * index, 10.0 * index + 1])
    view = network.view(head, task, seen)
    images = torch.randn(4, 3, 32, 32)
    pooled = network.features(images).mean((2, 3))
    expected = torch.cat([network.heads[index](pooled) for index in answering], 1)
    logits = view(images)
    assert logits.shape == (4, 2 * len(answering))
    torch.testing.assert_close(logits, expected)
    features = {id(parameter) for parameter in network.features.parameters()}
    heads = {id(p) for index in answering for p in network.heads[index].parameters()}
    assert {id(p) for p in view.parameters()} == features | heads


def test_heads_have_the_sizes_of_their_tasks(make_network):
    network = make_network(classes=[3, 5, 2]).eval()
    images = torch.randn(4, 3, 32, 32)
    assert network(images).shape == (4, 10)
    assert [network.view("multi", task, 3)(images).shape[1] for task in range(3)] == [3, 5, 2]
    assert [network.view("expanding", 0, seen)(images).shape[1] for seen in (1, 2, 3)] == [3, 8, 10]


def test_a_shared_head_answers_tasks_of_its_own_size_alone(make_network):
    network = make_network(classes=[3, 5, 3])
    assert network.view("shared", 2, 3)[-1] is network.heads[0]
    with pytest.raises(InputError, match=r"shared answers 3 classes, but task 2 has 5; .*multi"):
        network.view("shared", 1, 3)


def test_a_head_depends_on_no_later_task(make_network, same_bits):
    one, other = make_network(classes=[2, 4, 3]), make_network(classes=[2, 4, 7])
    assert same_bits(one.features.state_dict(), other.features.state_dict())
    assert same_bits(one.heads[:2].state_dict(), other.heads[:2].state_dict())


def test_labels_are_offset_under_an_expanding_head_only(make_network):
    network = make_network(classes=[4, 2, 3])
    assert [network.label_offset("expanding", task) for task in range(3)] == [0, 4, 6]
    assert [network.label_offset("shared", task) for task in range(3)] == [0, 0, 0]
    assert [network.label_offset("multi", task) for task in range(3)] == [0, 0, 0]


def test_training_task_two_leaves_the_other_heads_of_multi_alone(
    make_network, make_sequence, same_bits
):
    network = make_network(tasks=3)
    before = copy.deepcopy(network.heads)
    config = TrainingConfig(epochs=1, optimizer="adamw", lr=0.1, weight_decay=0.1, batch_size=4)
    device = torch.device("cpu")
    learner = Learner(make_sequence(tasks=3), config, head="multi", seed=0, device=device)
    learner.learn_task(network, Finetune("multi"), Progress(1, []))
    assert same_bits(network.heads[0].state_dict(), before[0].state_dict())
    assert same_bits(network.heads[2].state_dict(), before[2].state_dict())
    assert not torch.equal(network.heads[1].weight, before[1].weight)
    assert not torch.equal(network.heads[1].bias, before[1].bias)
