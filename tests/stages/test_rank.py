"""Stage rank: by the first task's training images, read only where they are needed."""

from pathlib import Path

import pytest
import torch

from permafrost.data import Batches
from permafrost.experiment import new_network
from permafrost.params import Params
from permafrost.ranking import filter_responses, network_evidence, order_filters
from permafrost.stages import rank as stage
from permafrost.stages.shared import FILTERS, FIRST, RANKS, SALIENCY, TASKS, seed_file
from permafrost.tensors import load_tensors, save_tasks, save_tensors


@pytest.fixture
def rank(tmp_path, monkeypatch, make_sequence):
    """Return a run of the stage in a project whose earlier stages are made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    sequence, generator = make_sequence(), torch.Generator().manual_seed(0)
    shown = []
    monkeypatch.setattr(stage, "draw_best_and_worst", lambda *args: shown.append(args[-1]))

    def run(metrics, aggregate="union"):
        params = Params.model_validate(
            {
                "split": {"classes_per_task": 2},
                "model": {"arch": "vgg11", "width": 0.05},
                "rank": {"metrics": metrics, "aggregate": aggregate},
                "freeze": {"metric": metrics[0]},
                "sweep": {"metrics": metrics},
                "runtime": {"device": "cpu"},
            }
        )
        # JSON is YAML too.
        Path("params.yaml").write_text(params.model_dump_json())
        network = new_network(params, 0)
        layers = network_evidence(network, 0).weights
        maps = {
            f"{name}/maps": torch.rand(len(weight), 32, 32, generator=generator)
            for name, weight in layers.items()
        }
        class_maps = torch.rand(2, 32, 32, generator=generator)
        save_tasks(seed_file(TASKS, 0), sequence)
        save_tensors(seed_file(FIRST, 0), network.state_dict())
        save_tensors(seed_file(FILTERS, 0), maps, {})
        save_tensors(seed_file(SALIENCY, 0), {"maps": class_maps}, {"classes": ["a", "b"]})
        stage.run(0)
        return network, sequence, load_tensors(seed_file(RANKS, 0))[0], shown

    return run


def test_the_stage_ranks_by_the_first_tasks_training_images(rank):
    network, sequence, ranks, shown = rank(["taylor", "bn_gamma", "pearson", "relevance"])
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    model = network.view("shared", 0, 1)
    expected = filter_responses(model, batches.ordered(64), 2, ["taylor", "relevance"])
    for criterion, layers in expected.items():
        for layer, scores in layers.items():
            assert torch.equal(ranks[f"{criterion}/{layer}/scores"], scores)
            assert torch.equal(ranks[f"{criterion}/{layer}/order"], order_filters(scores))
    assert ranks["bn_gamma/features.0/scores"].shape == (3, 1)
    assert shown == ["pearson"]  # the first that compares maps


def test_the_stage_combines_classes(rank):
    _, _, ranks, shown = rank(["fisher", "mse"], aggregate="combined")
    for criterion in ("fisher", "mse"):
        assert ranks[f"{criterion}/features.0/scores"].shape == (3, 1)
    assert shown == ["mse"]


def test_the_stage_reads_no_images_without_need(rank, monkeypatch):
    monkeypatch.delattr(stage, "load_tasks")
    _, _, ranks, shown = rank(["random", "magnitude"])
    assert "magnitude/features.0/order" in ranks
    assert shown == ["mse"]
