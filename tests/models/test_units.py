"""Which norm belongs to which convolution is read off the data flow."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permafrost.freezing import batch_norm_after
from permafrost.models.units import conv_layers, is_norm, trace_flow


class Net(nn.Module):
    """Convolutions registered before the norms, and in another order than they run in."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.second, self.first = nn.Conv2d(6, 6, 3), nn.Conv2d(3, 6, 3)
        self.bn2, self.bn1 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.between = between

    def forward(self, x):
        x = F.relu(self.bn1(self.between(self.first(x))))
        return F.relu(self.bn2(self.second(x))).mean((2, 3))


def test_pairs_and_order_are_those_of_the_data():
    flow = trace_flow(Net())
    assert flow.norms == {"first": ["bn1"], "second": ["bn2"]}
    assert list(flow.runs) == ["first", "second"]


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.5), torch.Tensor.contiguous])
def test_what_passes_the_same_values_on_does_not_part_a_pair(between):
    assert batch_norm_after(Net(between)) == {"first": "bn1", "second": "bn2"}


@pytest.mark.parametrize(
    "between",
    [nn.ReLU(inplace=True), nn.ReLU(), lambda x: x + 1],
    ids=["ReLU in place", "ReLU", "sum"],
)
def test_what_changes_the_values_parts_a_pair(between):
    assert batch_norm_after(Net(between)) == {"second": "bn2"}


def test_pre_activation():
    layers = [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]
    assert batch_norm_after(nn.Sequential(*layers, *copy.deepcopy(layers))) == {"3": "4"}


def test_a_network_that_runs_on_no_size_that_is_tried_is_followed_on_images_that_are_given():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 11 * 13, 2))
    assert list(trace_flow(model).runs) == ["0"]  # the convolutions run on any size
    model = nn.Sequential(nn.Unflatten(3, (3, 5)), nn.Flatten(2, 3), *model, nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="pass images"):
        trace_flow(model)


def test_nothing_of_the_network_is_changed_and_hooks_behind_modules_are_not_called():
    model, calls = Net(), []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    trace_flow(model)
    assert not calls
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not model.bn1._forward_pre_hooks
    assert len(model.first._forward_hooks) == 1


def test_norms_of_other_classes_are_norms():
    from torchvision.ops.misc import FrozenBatchNorm2d

    assert is_norm(FrozenBatchNorm2d(4))
    assert is_norm(nn.SyncBatchNorm(4))
    assert not is_norm(nn.GroupNorm(2, 4))
    assert not is_norm(nn.InstanceNorm2d(4))


def test_a_compiled_network_is_followed_too():
    model = torch.compile(Net(), backend="eager")
    model(torch.zeros(2, 3, 16, 16))
    norms = {"_orig_mod.first": "_orig_mod.bn1", "_orig_mod.second": "_orig_mod.bn2"}
    assert batch_norm_after(model) == norms


class Backwards(nn.Module):
    """Registered from the output to the input, with a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.unused, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3)
        self.first = nn.Conv2d(3, 5, 3)

    def forward(self, images):
        return self.last(self.first(images).relu()).mean((2, 3))


def test_convolutions_come_in_the_order_in_which_they_run():
    assert list(conv_layers(Backwards())) == ["first", "last"]


def test_of_a_network_that_runs_on_no_images_all_convolutions_come():
    model = nn.Sequential(nn.Conv2d(7, 4, 3), nn.Conv2d(3, 4, 3))
    assert list(conv_layers(model)) == ["0", "1"]
