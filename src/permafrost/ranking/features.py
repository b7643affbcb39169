"""Feature maps: which module of a network gives each filter's, found by data flow.

The feature map of a filter is the output of the norm that takes its convolution's output, if there
is one, and else the convolution's output, in eval mode and before the ReLU; a norm that contains
its activation gives the map behind the activation.
"""

from torch import Tensor, nn

from permafrost.models.units import trace_flow


def feature_layers(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Name the module whose output is the feature map of each convolution's filters.

    Parameters
    ----------
    model : nn.Module
        Any network; it is left as it was.
    images : Tensor (N, 3, H, W)
        What it is run on, in eval mode.

    Returns
    -------
    layers : dict[str, str]
        Convolution name to module name, in the order in which the convolutions run: the norm
        that takes the convolution's output, if there is one, else the convolution. What does not
        run in eval mode, such as GoogLeNet's auxiliary heads, is left out.

    Raises
    ------
    ValueError
        If a convolution runs twice, or one norm serves two convolutions.
    """
    flow = trace_flow(model, images)
    layers = {conv: next(iter(norms), conv) for conv, norms in flow.norms.items()}
    twice = [conv for conv, runs in flow.runs.items() if runs > 1]
    twice += [layer for layer in layers.values() if [*layers.values()].count(layer) > 1]
    if twice:
        raise ValueError(f"layer '{twice[0]}' runs more than once: it has no one feature map")
    return layers
