"""What may be merged and what must not: small models with one trap each, compared with stock in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.models import Residual, conv_norm, with_statistics
from tinytl_kernels import nn as tnn
from tinytl_kernels.convert import conversion_report, convert
from tinytl_kernels.nn import FrozenConvBias

X = torch.randn(2, 3, 13, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def converted(stock: nn.Module, method: str = "bias") -> nn.Module:
    """Convert, and check outputs and input gradients against stock in evaluation mode."""
    stock = with_statistics(stock, 16).double().eval()
    model = convert(stock, method, example_input=X)
    gradients = []
    for net in (model, stock):
        x = X.clone().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad))
    for name, ours, theirs in zip(("output", "input gradient"), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    return model


class Net(nn.Module):
    """``conv``, ``norm``, ``act`` and whatever forward does with them."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.act = act or nn.ReLU()


def test_a_plain_chain_becomes_one_module() -> None:
    model = converted(conv_norm(3, 8, nn.ReLU6(inplace=True)))
    assert (type(model[0]), model[0].activation) == (FrozenConvBias, "relu6")
    assert type(model[1]) is type(model[2]) is nn.Identity


def test_an_identity_between_does_not_matter() -> None:
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU()))
    assert model[0].activation == "relu"
    assert type(model[2]) is type(model[4]) is nn.Identity


def test_a_convolution_read_twice_is_not_folded_into() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(self.norm(y)) + y

    model = converted(Twice())
    assert model.conv.activation is None
    # The norm is a scale and a bias of its own then, with the activation.
    assert type(model.norm) is FrozenConvBias
    assert (model.norm.groups, model.norm.kernel_size, model.norm.activation) == (3, (1, 1), "relu")


def test_a_shared_activation_is_fused_where_a_convolution_is_before_it() -> None:
    model = converted(nn.Sequential(Residual(3), Residual(3)))
    assert type(model[0].relu) is tnn.ReLU
    assert (model[0].conv1.activation, model[0].conv2.activation) == ("relu", "relu")  # behind the sum, the second
    assert type(model[0].bn1) is nn.Identity


def test_a_shared_convolution_keeps_its_norms_apart() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(self.norm(self.conv(x))))

    model = converted(Shared())
    assert type(model.conv) is type(model.norm) is FrozenConvBias
    assert model.conv.activation is None
    assert model.norm.groups == 3


def test_norm_before_convolution_becomes_a_scale() -> None:
    model = converted(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 5, 3)))
    assert (model[0].groups, model[0].activation) == (3, "relu")
    assert model[0].bias.requires_grad


def test_norm_without_affine_folds() -> None:
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)))
    assert model[0].bias.requires_grad


def test_norm_without_statistics_stays_and_is_reported() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    model = converted(stock)
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[2]) is tnn.ReLU
    assert model[0].activation is None
    (note,) = conversion_report(model).kept
    assert note.path == "1"
    assert "track_running_stats=False" in note.text


def test_an_activation_that_overwrites_what_is_read_later_is_left_alone() -> None:
    class Trap(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return self.act(y) + self.conv(y)  # y is rectified for both

    model = converted(Trap(nn.ReLU(inplace=True)))
    assert type(model.act) is nn.ReLU
    assert any(note.path == "act" and "read again" in note.text for note in conversion_report(model).kept)


def test_an_activation_that_overwrites_a_view_is_left_alone() -> None:
    class Trap(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(y.flatten(2)).reshape_as(y) + y

    assert type(converted(Trap(nn.ReLU(inplace=True))).act) is nn.ReLU


def test_an_in_place_sum_before_an_in_place_activation_is_safe() -> None:
    assert type(converted(nn.Sequential(Residual(3)))[0].relu) is tnn.ReLU


def test_a_leaky_relu_of_another_slope_stays_beside_its_convolution() -> None:
    model = converted(nn.Sequential(conv_norm(3, 4, nn.LeakyReLU(0.3)), conv_norm(4, 4, nn.LeakyReLU())))
    assert (model[0][0].activation, type(model[0][2])) == (None, tnn.LeakyReLU)
    assert model[1][0].activation == "leaky_relu"


def test_hooked_modules_stay_themselves() -> None:
    stock = conv_norm(3, 4, nn.ReLU())
    seen: list[Tensor] = []
    stock[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model = converted(stock)
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[0]) is FrozenConvBias
    assert len(seen) > 0
    assert any("hooks" in note.text for note in conversion_report(model).kept)


def test_parametrized_convolutions_stay() -> None:
    stock = conv_norm(3, 4, nn.ReLU())
    nn.utils.parametrizations.weight_norm(stock[0])
    model = converted(stock)
    assert isinstance(model[0], nn.Conv2d)
    assert not isinstance(model[0], FrozenConvBias)
    assert any("parametrized" in note.text for note in conversion_report(model).kept)


class Standardised(nn.Conv2d):
    """Weight standardisation as the paper's authors do it, under a name of its own."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        std = w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        w = (w - w.mean((1, 2, 3), keepdim=True)) / std
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Noisy(nn.Conv2d):
    """Its weight depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (1 + x.mean()), self.bias, self.stride, self.padding)


class OnlyInTraining(nn.Conv2d):
    """Another weight in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (2 if self.training else 1), self.bias, self.stride, self.padding)


def test_a_standardised_weight_is_applied_once() -> None:
    model = converted(nn.Sequential(Standardised(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    assert type(model[0]) is FrozenConvBias


def test_convolutions_that_compute_something_else_stay_and_are_reported() -> None:
    for kind in (Noisy, OnlyInTraining):
        model = converted(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        assert type(model[0]) is kind
        assert type(model[1]) is FrozenConvBias
        assert conversion_report(model).kept[0].path == "0"


class Scaled(nn.BatchNorm2d):
    """Not a BatchNorm, whatever its class says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_norm_that_computes_something_else_stays() -> None:
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(4), nn.ReLU()))
    assert type(model[1]) is Scaled
    assert type(model[0]) is FrozenConvBias


class DataDependent(nn.Module):
    """Untraceable: forward branches on values. Its children are pieces of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_norm(3, 4, nn.ReLU())
        self.parts = conv_norm(4, 4, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.sum() > 1e9:
            x = x * 2
        x = self.parts[0](x)
        y = x.clone()  # what the second piece's convolution gives is read here too
        return self.parts[2](self.parts[1](x)) + y


def test_around_an_untraceable_module_everything_else_converts() -> None:
    model = converted(nn.Sequential(DataDependent(), conv_norm(4, 4, nn.ReLU())))
    assert model[0].body[0].activation == "relu"
    assert model[1][0].activation == "relu"
    # Called one by one, not as the Sequential that was traced: nothing may be merged.
    assert model[0].parts[0].activation is None
    assert type(model[0].parts[1]) is FrozenConvBias
    assert type(model[0].parts[2]) is tnn.ReLU
    assert any("torch.fx cannot trace" in note.text for note in conversion_report(model).kept)


class WholeAndInPieces(nn.Module):
    """Untraceable: calls a ``Sequential``, and its parts one by one, as often."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = conv_norm(3, 3, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        y = self.parts[0](self.parts(x))
        return self.parts[2](self.parts[1](y)) + y


def test_a_piece_that_is_also_called_in_parts_is_not_merged() -> None:
    model = converted(nn.Sequential(WholeAndInPieces()))
    assert model[0].parts[0].activation is None


def test_without_a_run_the_graph_alone_tells_what_is_shared() -> None:
    stock = with_statistics(nn.Sequential(Residual(3), Residual(3)), 16).double().eval()
    model = convert(stock, "bias", example_input=torch.zeros(1, 5, 8, 8))  # too many channels
    assert any("could not be run" in text for text in conversion_report(model).warnings)
    torch.testing.assert_close(model(X), stock(X))


@pytest.mark.parametrize("extra_read_in", [True, False])
def test_control_flow_on_the_mode_is_right_in_both(extra_read_in: bool) -> None:
    class Modes(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.norm(y)
            return self.act(z) + (y if self.training is extra_read_in else 0)

    stock = with_statistics(Modes(), 16).double().eval()
    model = convert(stock, "bias", example_input=X)
    torch.testing.assert_close(model(X), stock(X))
    stock.train()
    stock.norm.eval()
    torch.testing.assert_close(model.train()(X), stock(X))


def test_a_module_under_two_names_stays_one() -> None:
    class Alias(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.other(x)))

    model = converted(Alias())
    assert model.conv is model.other
    assert model.conv.activation == "relu"


def test_pools_and_dropout_are_swapped_where_that_saves() -> None:
    stock = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Dropout(0.3),
        nn.Dropout(0.0),
        nn.AdaptiveAvgPool2d(1),
    )
    model = converted(stock)
    assert [type(m) for m in model[1:]] == [
        *(tnn.MaxPool2d, tnn.AvgPool2d, tnn.AdaptiveAvgPool2d, tnn.Dropout),
        *(nn.Dropout, nn.AdaptiveAvgPool2d),
    ]


def test_a_subclass_of_an_activation_is_not_taken_for_it() -> None:
    class Shifted(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return F.relu(input - 1)

    model = converted(conv_norm(3, 4, Shifted()))
    assert model[0].activation is None


def test_timm_norms_with_activation_and_frozen_norms_fold() -> None:
    from tinytl_kernels.models import import_timm, import_torchvision

    import_timm()
    from timm.layers import BatchNormAct2d

    frozen = import_torchvision().ops.FrozenBatchNorm2d(4)
    for buffer in frozen.buffers():
        buffer.uniform_(0.5, 1.5)
    stock = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4, drop_layer=None), nn.Conv2d(4, 4, 3, bias=False), frozen
    )
    model = converted(stock)
    assert model[0].activation == "relu"
    assert [type(m) for m in model] == [FrozenConvBias, nn.Identity, FrozenConvBias, nn.Identity]
    live = converted(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), "norm+last")
    assert type(live[1].act) is tnn.ReLU


def test_modules_whose_tensors_are_read_directly_stay() -> None:
    class Direct(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.conv.weight, padding=1)
            n = self.norm
            return self.act(F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps))

    model = converted(Direct())
    assert (type(model.conv), type(model.norm)) == (nn.Conv2d, nn.BatchNorm2d)
    kept = [(note.path, note.text) for note in conversion_report(model).kept]
    assert ("", "a functional convolution keeps its input: use nn.Conv2d") in kept
    assert ("conv", "keeps its input: its tensors are read without calling it") in kept


def test_modules_that_are_never_called_stay() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(x)))

    model = converted(Spare())
    assert type(model.spare) is nn.Conv2d
    assert ("spare", "keeps its input: it is never called") in {(n.path, n.text) for n in conversion_report(model).kept}


def test_one_dimensional_batchnorms_stay_live_and_are_reported() -> None:
    stock = nn.Sequential(conv_norm(3, 4, nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
    (note,) = conversion_report(converted(stock)).kept
    assert note.path == "3"
    assert "statistics stay live" in note.text
