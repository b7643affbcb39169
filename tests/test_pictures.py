"""Drawing."""

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from permafrost.pictures import draw_saliency


@pytest.fixture
def backend():
    """Set a backend as a notebook does."""
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    yield "svg"
    matplotlib.use(before)


@pytest.mark.parametrize("name", ["cat", r"$\frac{", r"a \$ and a $", "$" * 30])
def test_drawing_leaves_a_notebook_alone(tmp_path, backend, name):
    settings, path = dict(matplotlib.rcParams), tmp_path / "new/picture.png"
    images, maps = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.rand(4, 8, 8)
    draw_saliency(path, [name, "dog"], images, maps, maps[:2], "fullgrad")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend() == backend
    assert dict(matplotlib.rcParams) == settings
    assert pyplot.get_fignums() == []
