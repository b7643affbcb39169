"""Feature maps: which module of a network gives each filter's, found by data flow."""

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


def check_logits(logits: object, images: Tensor, labels: Tensor) -> Tensor:
    """Return what a network has put out, unless it is not one logit or more for every label."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"the model must return logits (N, C), not {found}")
    if logits.shape[1] <= int(labels.max()):
        raise ValueError(f"the model returns {logits.shape[1]} logits, too few for the labels")
    return logits
