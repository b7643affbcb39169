"""Layer-wise relevance propagation: how much of a logit runs through each filter."""

import copy

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from permafrost.explain import conv_layers
from permafrost.freezing import batch_norm_after


class FilterRelevance:
    """Relevance of every filter for a logit, by captum's layer-wise relevance propagation.

    Relevance starts as the logit and is handed down layer by layer (Bach et al. 2015). Linear
    layers and pooling share it out by the ε-rule, where ε only guards against a division by 0;
    convolutions by the rule α=1, β=0 without biases, as in the composite that Kohlbrenner et al.
    (2020) recommend. The ε-rule alone would make relevance in a ReLU network gradient times
    activation (Ancona et al. 2018), which ``taylor`` measures already. ReLUs pass relevance on
    unchanged, so the filter's output is meant before and behind its ReLU alike.

    The filters of each layer sum to the logit less the bias of the linear layer that gave it; on
    the way down only filters that are active by their bias alone lose their share.

    Parameters
    ----------
    model : nn.Module
        Network of images (N, 3, H, W) to logits (N, C). It is copied, since captum changes weights
        in between and leaves attributes behind. Each layer must be a module and run once: captum
        sees neither sums nor activations written into a ``forward`` (residual networks). Its rule
        α=1, β=0 is exact for inputs of 0 or more, such as a ReLU gives; what the first
        convolution hands down to the image is not used.

    References
    ----------
    Bach, Binder, Montavon, Klauschen, Müller & Samek, "On pixel-wise explanations for non-linear
    classifier decisions by layer-wise relevance propagation", PLoS ONE 10(7), 2015.
    Kohlbrenner, Bauer, Nakajima, Binder, Samek & Lapuschkin, "Towards best practice in explaining
    neural network decisions with LRP", IJCNN 2020.
    Ancona, Ceolini, Öztireli & Gross, "Towards better understanding of gradient-based attribution
    methods for deep neural networks", ICLR 2018.
    """

    def __init__(self, model: nn.Module) -> None:
        # In single precision, a denominator that should be 0 may be a rounding error beyond ε.
        self.network = copy.deepcopy(model).eval().double()
        # As a layer of its own, BatchNorm would need a rule that splits its bias off.
        for conv_name, norm_name in batch_norm_after(self.network).items():
            conv, norm = (self.network.get_submodule(name) for name in (conv_name, norm_name))
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            self.network.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            self.network.set_submodule(norm_name, nn.Identity())

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the relevance for the labels' logits over each filter's positions.

        Parameters
        ----------
        images : Tensor (N, 3, H, W)
            Normalised, on the model's device.
        labels : Tensor (N,)
            int64: the logit to explain for each image.

        Returns
        -------
        relevance : dict[str, Tensor (N, F)]
            float64, by convolution; negative where a filter speaks against the label, or where
            the logit itself is negative.

        Raises
        ------
        TypeError
            If captum has no rule for one of the model's modules.
        """
        from captum.attr import LayerLRP  # here, since importing it takes seconds

        self._set_rules()
        layers = conv_layers(self.network)
        explainer = LayerLRP(self.network, list(layers.values()))
        inputs = images.detach().double().requires_grad_()
        relevance = explainer.attribute(inputs, target=labels)
        return {name: values.sum((2, 3)) for name, values in zip(layers, relevance, strict=True)}

    def _set_rules(self) -> None:
        """Choose the rules that are not captum's default; captum removes them after each use."""
        from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                module.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
            elif isinstance(module, nn.Flatten | nn.Identity):
                module.rule = EpsilonRule()
