"""Stage saliency: by the method that is asked for, and by whole terms."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from explained import DECOMPOSED, vary_batch_norm
from permafrost.explain import SALIENCY_METHODS
from permafrost.params import Params
from permafrost.ranking import method as ranking_method
from permafrost.stages import saliency as stage
from permafrost.tensors import load_tensors, save_tasks


@pytest.fixture
def run_stage(monkeypatch, tmp_path, make_sequence, make_network):
    """Return a function that runs the stage by a method in an empty folder."""
    monkeypatch.chdir(tmp_path)
    save_tasks(tmp_path / "data/tasks/0.safetensors", make_sequence())
    network = make_network(width=0.1)
    vary_batch_norm(network).float()

    def run(method: str) -> dict:
        @contextmanager
        def open_workspace(_name, _seed):
            yield SimpleNamespace(
                params=Params(saliency={"method": method}),
                device=torch.device("cpu"),
                first_network=lambda _seed: network,
                obtain=lambda _stage, _settings, _inputs, _code, make: make(),
            )

        monkeypatch.setattr(stage, "open_workspace", open_workspace)
        stage.run(0)
        tensors, about = load_tensors(tmp_path / "models/saliency/0.safetensors")
        assert (tmp_path / "reports/saliency/0.png").stat().st_size > 0
        return tensors | about

    return run


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_the_stage_uses_the_method(run_stage, capsys, method):
    written = run_stage(method)
    assert written["maps"].shape == (2, 32, 32)
    assert written["method"] == method
    printed = capsys.readouterr().out
    assert printed.startswith(f"saliency, seed 0: maps by {method}")
    assert ("add up" in printed) == (method in DECOMPOSED)
    assert (written["completeness_error"] is None) == (method not in DECOMPOSED)


def test_the_stages_maps_differ_by_method(run_stage):
    assert not torch.allclose(run_stage("fullgrad")["maps"], run_stage("gradcam")["maps"])


def test_the_stage_refuses_incomplete_terms(run_stage, monkeypatch):
    monkeypatch.setattr(ranking_method, "COMPLETENESS_BOUND", 0)
    with pytest.raises(ranking_method.IncompleteSaliency, match=r"smooth_fullgrad's terms miss"):
        run_stage("smooth_fullgrad")
    run_stage("gradcam")
