"""What holds on a GPU; all of it is skipped, by name, where there is none."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from permafrost.data import Batches
from permafrost.devices import images_at_once, prepare_device
from permafrost.evaluation.accuracy import accuracy
from permafrost.explain import (
    completeness_error,
    conv_layers,
    fullgrad,
    start_image,
    visualize_filters,
)
from permafrost.freezing import frozen_filters
from permafrost.models.units import trace_flow
from permafrost.strategies import STRATEGIES, Learner, Progress
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.training import TrainingConfig, fit
from permafrost.training.steps import RecordedStep
from project import Project

pytestmark = pytest.mark.gpu

SGD = TrainingConfig(epochs=2, lr=0.02, weight_decay=0.05, batch_size=4, padding=2, flip=True)
OPTIMIZERS = {
    "sgd": SGD,
    "adam": replace(SGD, optimizer="adam", lr=0.01),
    "adamw": replace(SGD, optimizer="adamw", lr=0.01),
}
# Two classes of seven images are three batches of four and one of two.
SIZES = {"train": 7, "tasks": 3}


@pytest.fixture
def device():
    """Return the GPU, set as the stages set it; on leaving all switches are as they were."""
    found = prepare_device("cuda", 1)
    yield found
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def replayed(monkeypatch):
    """Return how many steps were replayed."""
    found, plain = [], RecordedStep.__call__

    def call(self, batch):
        results = plain(self, batch)
        found.append(self._recorded is not None and len(batch.labels) == 4)
        return results

    monkeypatch.setattr(RecordedStep, "__call__", call)
    return found


@pytest.fixture
def train(device, make_network, make_sequence):
    """Return a function that trains a view of a network on the first task's images."""
    sequence = make_sequence(**SIZES)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, device)

    def train(config, masks=None, network=None, **options):
        network = (network or make_network(width=0.25)).to(device)
        draws = torch.Generator().manual_seed(0)
        with frozen_filters(network, masks) if masks else nullcontext():
            view = network.view("shared", 0, 1)
            fit(view, batches, config, generator=draws, **options)
        return network.state_dict()

    return train


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_filters_stay_bit_for_bit(
    make_network, half_masks, train, replayed, config, precision
):
    network = make_network(width=0.25)
    before, masks = copy.deepcopy(network.state_dict()), half_masks(network)
    norms = trace_flow(network).norms
    after = train(replace(config, precision=precision), masks, network)
    for conv, mask in masks.items():
        for layer in (conv, *norms[conv]):
            for name in (name for name in before if name.rpartition(".")[0] == layer):
                if before[name].ndim == 0:
                    continue  # BatchNorm's count of batches
                old, new = before[name], after[name].cpu()
                assert torch.equal(old[mask], new[mask]), name
                assert not torch.equal(old[~mask], new[~mask]), name
    assert replayed.count(True) == 2 * 3


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_same_seed_gives_the_same_bits(half_masks, make_network, train, config, same_bits):
    """Run after run, and when a training goes on after an epoch."""
    masks, states = half_masks(make_network(width=0.25)), []
    config = replace(config, epochs=3)

    def keep(state):
        states.append(copy.deepcopy(state))
        tensors = states[-1].tensors  # as a file gives them back
        tensors |= {name: value.contiguous() for name, value in tensors.items()}

    whole = train(config, masks, on_epoch=keep)
    assert same_bits(train(config, masks), whole)
    assert same_bits(train(config, masks, resume=states[0]), whole)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_method_replays_what_it_would_compute(
    device, make_network, make_sequence, make_strategy, keep, learn_first, monkeypatch, replayed,
    name,
):  # fmt: skip
    """A replayed training is the plain one's, up to the order in which libraries sum."""
    sequence, strategy = make_sequence(**SIZES), make_strategy(name, "multi")
    network = make_network(tasks=3)
    memory = learn_first(network, sequence, SGD, strategy)

    def learn():
        other = copy.deepcopy(network).to(device)
        course = Learner(sequence, SGD, head="multi", seed=0, device=device, keep=keep)
        strategy.learn(course, other, Progress(1, [None, None], memory=dict(memory)))
        return other.state_dict()

    recorded = learn()
    assert replayed.count(True) > 0
    monkeypatch.setattr("permafrost.training.loop.recorder", lambda device: None)
    plain = learn()
    for key, value in plain.items():
        torch.testing.assert_close(recorded[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_explanations_are_a_cpus(device, make_network, make_sequence):
    network = make_network(width=0.25).eval()
    view = network.view("shared", 0, 1)
    sequence = make_sequence()
    (images, labels), *_ = Batches(sequence.tasks[0].train, sequence.normalization, "cpu").ordered(
        8
    )
    start = start_image(32, (0.5,) * 3, (0.25,) * 3, 0)
    names = [name for name, _ in view.named_parameters()]
    first, *_ = conv_layers(view)

    def explain(where):
        model = copy.deepcopy(view).to(where)
        x, y = images.to(where), labels.to(where)
        assert completeness_error(model, x, y).max() < 1e-4
        return {
            "maps": fullgrad(model, x, y),
            # Deeper pictures depend on rounding: see `visualize_filters`.
            "pictures": visualize_filters(model, first, start=start.to(where), steps=5),
            **fisher_diagonal(model, [(x, y)], names),
        }

    there, here = explain(device), explain("cpu")
    for name, value in here.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_accuracy_is_a_cpus(device, make_network, make_sequence):
    network, sequence = make_network(width=0.25).eval(), make_sequence(test=30)
    for head in network.heads:
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))

    def measure(where):
        batches = Batches(sequence.tasks[0].test, sequence.normalization, where)
        return accuracy(copy.deepcopy(network).to(where).view("shared", 0, 1), batches, 2)

    assert measure(device) == measure("cpu")


def test_a_gpu_computes_as_many_images_as_its_memory_holds(device):
    small, large = (torch.zeros(3, size, size, device=device) for size in (32, 224))
    assert (images_at_once(small, 64), images_at_once(large, 64)) == (512, 64)


def test_no_memory_is_told_with_what_to_lower(tmp_path, device):
    """A card that is full: the stage says so in one line."""
    project = Project(tmp_path / "permafrost")
    project.change({"runtime": {"device": "cuda"}})
    project.run("permafrost", "split", "--seed", "0")
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.zeros(max(0, free - 2**28), dtype=torch.uint8, device=device)
    output = project.run("permafrost", "train_first", "--seed", "0", code=2)
    assert "train.batch_size" in output
    assert "Traceback" not in output
    del kept


def test_a_whole_workflow(tmp_path):
    """All runs end, a second repro runs nothing, and the same bits come out anew."""
    project = Project(tmp_path / "permafrost")
    project.change({"runtime": {"device": "cuda"}})
    project.run("dvc", "repro")
    assert "up to date" in project.run("dvc", "repro")
    before = project.read("metrics/sweep.json")
    project.run("dvc", "repro", "-f", PERMAFROST_FRESH="1")
    after = project.read("metrics/sweep.json")
    accuracies = [[row["R"] for row in rows] for rows in (before, after)]
    assert accuracies[0] == accuracies[1]
    assert {row["status"] for row in after} == {"done"}
