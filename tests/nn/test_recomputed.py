"""recompute: exact gradients, the input alone kept, and everything else as if the block were computed once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.checks import assert_as_exact_as_torch, saved_bytes
from tests.process_group import run_in_process_group
from tinytl_kernels import FrozenConvBias
from tinytl_kernels import nn as tnn
from tinytl_kernels.nn import recomputed
from tinytl_kernels.nn.recomputed import Recomputed, recompute, stop_recomputing


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = FrozenConvBias(channels, 4, 1, activation="relu")
        self.expand = FrozenConvBias(4, channels, 1)

    def forward(self, x):
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True))).sigmoid()


class Block(nn.Module):
    """An inverted residual block; the norm and the activation decide what has to be kept."""

    def __init__(self, channels: int = 6, hidden: int = 24, kind: str = "group norm") -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = (
            self._layer(kind, channels, hidden, 1, "relu6"),
            self._layer(kind, hidden, hidden, 3, "relu6", padding=1, groups=hidden),
            self._layer(kind, hidden, channels, 1, None),
        )
        self.se = SqueezeExcite(hidden) if kind == "squeeze and excite" else nn.Identity()

    @staticmethod
    def _layer(kind, *geometry, padding=0, groups=1):
        *geometry, activation = geometry
        if kind == "group norm":
            conv = FrozenConvBias(*geometry, padding=padding, groups=groups, bias=False)
            norm = tnn.GroupNorm(geometry[1] // 3, geometry[1], activation=activation)
            nn.init.normal_(norm.bias)
            norm.weight.requires_grad_(False)
            return nn.Sequential(conv, norm)
        smooth = activation and "hardswish"
        return nn.Sequential(FrozenConvBias(*geometry, padding=padding, groups=groups, activation=smooth))

    def forward(self, x):
        return x + self.project(self.se(self.depthwise(self.expand(x))))


KINDS = ("group norm", "squeeze and excite")


@pytest.fixture(params=[1, 2, 100], ids=lambda n: f"{n} at a time")
def at_a_time(request, monkeypatch):
    """How many images are computed at once, by choosing the budget that a block of this file keeps of as many."""
    monkeypatch.setattr(
        "tinytl_kernels.nn.recomputed._chunks",
        lambda images, kept, device: [
            slice(start, min(images, start + request.param)) for start in range(0, max(1, images), request.param)
        ],
    )
    return request.param


def gradients(model, x, grad_output, **options):
    model.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(leaf)
    output.backward(grad_output.to(output.dtype), **options)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": leaf.grad, **named}


def assert_exact(recomputed, plain, x):
    g = torch.randn_like(plain(x))
    mine, theirs = gradients(recomputed, x, g), gradients(plain, x, g)
    exact = gradients(copy.deepcopy(plain).double(), x.double(), g)
    assert mine.keys() == theirs.keys() == exact.keys()
    for name in exact:
        assert_as_exact_as_torch(name, mine[name], theirs[name], exact[name])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_block(kind, layout, at_a_time):
    plain = Block(kind=kind)
    x = torch.randn(5, 6, 7, 9).contiguous(memory_format=layout)
    assert_exact(recompute(copy.deepcopy(plain)), plain, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_gives_the_gradients_of_the_plain_blocks(kind, at_a_time):
    plain = nn.Sequential(*(Block(kind=kind) for _ in range(3)))
    segment = copy.deepcopy(plain)
    for i, block in enumerate(segment):
        recompute(block, keep_input=i == 0)
    x = torch.randn(5, 6, 7, 9)
    assert_exact(segment, plain, x)
    assert saved_bytes(lambda: segment(x.requires_grad_()), exclude=[x, *segment.parameters()]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_its_input_alone(kind):
    block, x = recompute(Block(kind=kind)), torch.randn(4, 6, 8, 8, requires_grad=True)
    block(x)  # the first call measures
    assert saved_bytes(lambda: block(x), exclude=block.parameters()) == x.nbytes
    assert saved_bytes(lambda: stop_recomputing(block)(x), exclude=block.parameters()) > 4 * x.nbytes


def test_as_many_images_at_a_time_as_fit_the_budget(monkeypatch):
    block, x = recompute(Block()), torch.randn(5, 6, 8, 8, requires_grad=True)
    sizes = []
    block.expand.register_forward_hook(lambda module, args, output: sizes.append(output.size(0)))
    one = saved_bytes(lambda: stop_recomputing(copy.deepcopy(block))(x[:1]), exclude=[x, *block.parameters()])
    monkeypatch.setattr("tinytl_kernels.nn.recomputed.CHUNK_BYTES", {"cpu": int(2.5 * one)})
    sizes.clear()
    block(x).sum().backward()
    assert sizes == [1, 2, 2, 1, 2, 2, 1]  # one to measure; forward; backward


def test_an_input_that_was_written_to_is_kept():
    plain = nn.Sequential(Block(), nn.ReLU(inplace=True), Block())
    segment = copy.deepcopy(plain)
    recompute(segment[0])
    recompute(segment[2], keep_input=False)
    assert_exact(segment, plain, torch.randn(3, 6, 7, 9))


def test_an_input_whose_gradient_somebody_waits_for_is_kept():
    first, second = recompute(Block()), recompute(Block(), keep_input=False)
    between = first(torch.randn(2, 6, 5, 5))
    seen = []
    between.register_hook(seen.append)
    second(between).sum().backward()
    assert len(seen) == 1


def test_a_segment_through_the_same_block_twice():
    plain = Block()
    block = recompute(copy.deepcopy(plain), keep_input=False)
    assert_exact(nn.Sequential(block, block), nn.Sequential(plain, plain), torch.randn(3, 6, 7, 9))


def test_trained_weights_inside_get_their_gradients(at_a_time):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), tnn.GroupNorm(2, 8, activation="silu"))
    assert_exact(recompute(copy.deepcopy(plain)), plain, torch.randn(5, 3, 7, 7))


def test_parameter_hooks_fire_once(at_a_time):
    block = recompute(Block())
    bias, calls = block.expand[1].bias, []
    bias.register_hook(lambda grad: calls.append("gradient"))
    bias.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    block(torch.randn(4, 6, 5, 5)).sum().backward()
    assert calls == ["gradient", "accumulated"]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_again_the_same(kind, at_a_time):
    plain = nn.Sequential(Block(kind=kind), nn.Conv2d(6, 6, 1))  # a stock layer: autocast keeps a cast of its weight
    mine, x, g = recompute(copy.deepcopy(plain)), torch.randn(4, 6, 7, 7), torch.randn(4, 6, 7, 7)
    results = []
    for model in (mine, plain):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                model(x)  # leaves a cast without history in autocast's cache, if it can
            output = model(x)
        output.backward(g.to(output.dtype))
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (a, mine), (b, theirs) = results
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0.03, atol=0.03 * theirs[name].abs().max().item())


@pytest.mark.parametrize("lean", [False, True], ids=["stock dropout", "lean dropout"])
def test_what_was_drawn_is_drawn_again(lean, at_a_time):
    dropout = tnn.Dropout(0.5) if lean else nn.Dropout2d(0.5)
    block = recompute(nn.Sequential(FrozenConvBias(3, 8, 3, bias=False), dropout))
    x, g = torch.randn(5, 3, 6, 6, requires_grad=True), torch.randn(5, 8, 4, 4)
    y = block(x)
    after = torch.get_rng_state()
    block.eval()  # backward still belongs to the forward in training mode
    y.backward(g)
    assert not block.training
    assert not dropout.training
    assert torch.equal(torch.get_rng_state(), after)
    # The block is linear in x, with the factors it drew: <y, g> = <x, dx>.
    torch.testing.assert_close((y * g).sum(), (x * x.grad).sum())
    assert (y == 0).any()


def in_distributed_data_parallel():
    """Every process takes its share of the images: the averaged gradients are those of one process with all of them."""
    recomputed.CHUNK_BYTES = {"cpu": 1}  # one image at a time: the reducer takes each gradient once and no sooner
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), *(Block() for _ in range(3)))
    x, g = torch.randn(4 * size, 3, 9, 7), torch.randn(4 * size, 6, 7, 5)
    exact = gradients(copy.deepcopy(plain).double(), x.double(), g)
    theirs = gradients(plain, x, g)
    for options in ({}, dict(gradient_as_bucket_view=True), dict(static_graph=True)):
        mine = copy.deepcopy(plain)
        for i, block in enumerate(mine[1:]):
            recompute(block, keep_input=i == 0)  # one segment
        model = nn.parallel.DistributedDataParallel(mine, bucket_cap_mb=1e-4, **options)  # a bucket or two a layer
        for repetition in range(2):
            mine.zero_grad()
            model(x[4 * rank : 4 * rank + 4]).backward(g[4 * rank : 4 * rank + 4])
            for name, parameter in mine.named_parameters():
                if name in exact:
                    averaged = parameter.grad * size
                    assert_as_exact_as_torch(f"{options}, {repetition}: {name}", averaged, theirs[name], exact[name])


def test_distributed_data_parallel_averages_the_gradients():
    run_in_process_group(in_distributed_data_parallel, processes=2)


def accumulating_in_distributed_data_parallel():
    """Two halves of the batch, the first of which stays in its process."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plain = Block()
    x, g = torch.randn(2 * size, 2, 6, 9, 7), torch.randn(2 * size, 2, 6, 9, 7)
    exact = gradients(copy.deepcopy(plain).double(), x.flatten(0, 1).double(), g.flatten(0, 1))
    theirs = gradients(plain, x.flatten(0, 1), g.flatten(0, 1))
    mine = recompute(copy.deepcopy(plain))
    model = nn.parallel.DistributedDataParallel(mine)
    mine.zero_grad()
    with model.no_sync():
        model(x[2 * rank]).backward(g[2 * rank])
    model(x[2 * rank + 1]).backward(g[2 * rank + 1])
    for name, parameter in mine.named_parameters():
        if name in exact:
            assert_as_exact_as_torch(name, parameter.grad * size, theirs[name], exact[name])


def test_distributed_data_parallel_accumulates():
    run_in_process_group(accumulating_in_distributed_data_parallel, processes=2)


def test_drop_path_of_the_whole_batch_is_not_cut():
    class StochasticDepth(nn.Module):
        p, mode = 0.5, "batch"

    with pytest.raises(ValueError, match="one number for the whole batch"):
        recompute(nn.Sequential(StochasticDepth()))


def test_backward_twice_with_retain_graph():
    block = recompute(Block())
    y = block(torch.randn(2, 6, 5, 5))
    y.sum().backward(retain_graph=True)
    once = block.expand[1].bias.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(block.expand[1].bias.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_second_derivative_is_refused():
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(recompute(Block())(x).sum(), x, create_graph=True)


def test_a_parameter_changed_before_backward_is_an_error():
    block = recompute(Block())
    y = block(torch.randn(2, 6, 5, 5))
    with torch.no_grad():
        block.expand[1].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_graph_where_no_gradient_can_be_asked_for():
    block = recompute(Block(), keep_input=False)
    with torch.no_grad():
        assert block(torch.randn(3, 6, 5, 5, requires_grad=True)).grad_fn is None
    block.requires_grad_(False)
    assert not block(torch.randn(3, 6, 5, 5)).requires_grad


def test_the_block_stays_what_it_is():
    plain = Block()
    block = recompute(copy.deepcopy(plain), keep_input=False)
    assert isinstance(block, Block)
    assert isinstance(block, Recomputed)
    assert list(block.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 6, 5, 5)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(copied) is type(block)
        assert not copied.keep_input
        assert torch.equal(copied(x), block(x))
        assert copied.expand[1].bias is not block.expand[1].bias
    assert type(stop_recomputing(block)) is Block
    assert vars(block).keys() == vars(plain).keys()


def test_an_empty_batch():
    block, x = recompute(Block()), torch.randn(0, 6, 5, 5, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not block.expand[1].bias.grad.any()


def test_compiles_as_one_graph():
    plain = Block()
    compiled = torch.compile(recompute(copy.deepcopy(plain)), fullgraph=True, backend="aot_eager")
    x, g = torch.randn(3, 6, 5, 5), torch.randn(3, 6, 5, 5)
    expected = gradients(plain, x, g)
    for name, value in gradients(compiled, x, g).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False).eval(),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_statistics_of_the_batch_are_refused(norm):
    with pytest.raises(ValueError, match="statistics from the batch"):
        recompute(nn.Sequential(norm))


def test_frozen_statistics_are_taken_as_long_as_they_are_frozen():
    block, x = recompute(nn.Sequential(nn.BatchNorm2d(4)).eval()), torch.randn(3, 4, 5, 5)
    assert torch.equal(block(x), stop_recomputing(copy.deepcopy(block))(x))
    with pytest.raises(ValueError, match="statistics from the batch"):
        block.train()(x)


def test_recomputing_twice_is_refused():
    with pytest.raises(ValueError, match="recomputed already"):
        recompute(recompute(Block()))


def test_a_module_that_does_not_map_images_to_images_is_an_error():
    with pytest.raises(TypeError, match="maps 2 images to as many"):
        recompute(nn.Flatten(0))(torch.randn(2, 3, 4, 4, requires_grad=True))
