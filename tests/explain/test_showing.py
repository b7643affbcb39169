"""Figures for notebooks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from permafrost.explain import show, show_filters


def test_an_image_stands_beside_its_map_and_under_it():
    image, saliency = torch.randn(3, 8, 12), torch.rand(8, 12)
    figure = show(image, saliency, title="a cat")
    assert isinstance(figure, Figure)
    picture, heat, both = (axis.images for axis in figure.axes)
    drawn = picture[0].get_array()
    assert drawn.shape == (8, 12, 3)
    assert (drawn.min(), drawn.max()) == (0, 1)
    np.testing.assert_allclose(heat[0].get_array(), both[1].get_array())
    assert both[1].get_alpha() == 0.6
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="image must be"):
        show(image, torch.rand(12, 8))


def test_filters_stand_side_by_side():
    figure = show_filters(torch.rand(5, 3, 8, 8), columns=3)
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["0", "1", "2", "3", "4"]
    assert len(figure.axes) == 6
    assert show_filters(torch.zeros(1, 3, 4, 4), ["dead"]).axes[0].get_title() == "dead"
    with pytest.raises(ValueError, match="2 titles for 1"):
        show_filters(torch.rand(1, 3, 4, 4), ["a", "b"])
    with pytest.raises(ValueError, match="pictures must be"):
        show_filters(torch.rand(0, 3, 4, 4))


def test_no_backend_is_touched():
    code = (
        "import sys, torch; from permafrost.explain import show;"
        "show(torch.rand(3, 4, 4), torch.rand(4, 4)); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
