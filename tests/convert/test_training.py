"""The converted model under the user's own training loop: DDP, AMP, compile, checkpoints, accumulation, modes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.convert.models import SmallNet, with_statistics, zoo_model
from tests.process_group import run_in_process_group
from tinytl_kernels.convert import conversion_report, convert

METHOD = "lite_residual+bias"


def small(method: str = METHOD) -> nn.Module:
    model = convert(with_statistics(SmallNet()), method, num_classes=4, example_input=torch.zeros(1, 3, 32, 32))
    for block in model.blocks:
        if method.startswith("lite"):
            nn.init.uniform_(block.lite.final_bn.weight, 0.5, 1.0)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model: nn.Module) -> nn.Module:
    model.dropout.p = 0.0
    return model


def test_state_dict_round_trip() -> None:
    first, second = small(), small()
    x = torch.randn(2, 3, 32, 32)
    missing = second.load_state_dict(first.state_dict(), strict=True)
    assert not missing.missing_keys
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_deepcopy_and_pickle() -> None:
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
        assert conversion_report(other).method == METHOD


def test_gradients_accumulate() -> None:
    model = without_dropout(small()).eval()
    x = torch.randn(4, 3, 32, 32)
    model(x).square().sum().backward()
    whole = gradients(model)
    model.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert whole.keys() == set(conversion_report(model).trained)


def test_a_training_loop_learns() -> None:
    model = small()
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    x[:, 0] += y.view(-1, 1, 1).float()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_autocast_keeps_float32_bias_gradients() -> None:
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 32, 32)).float().square().sum()
    loss.backward()
    found = gradients(model)
    assert found.keys() == set(conversion_report(model).trained)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training: bool) -> None:
    model = without_dropout(small()).train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for net in (model, compiled):
        net(x).square().sum().backward()
    for (name, ours), theirs in zip(gradients(twin).items(), gradients(model).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert conversion_report(compiled).method == METHOD


def test_a_zoo_model_with_dynamic_padding_compiles() -> None:
    model = convert(zoo_model("timm:tf_efficientnet_lite0"), "bias", example_input=torch.randn(1, 3, 33, 33))
    x = torch.randn(1, 3, 33, 33)
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


def in_distributed_data_parallel() -> None:
    model = without_dropout(small())
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    wrapped = nn.parallel.DistributedDataParallel(twin)
    for net in (model, wrapped):
        net(x).square().sum().backward()
    assert gradients(twin).keys() == gradients(model).keys() == set(conversion_report(wrapped).trained)
    for (name, ours), theirs in zip(gradients(twin).items(), gradients(model).values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


def test_distributed_data_parallel_gives_the_same_gradients() -> None:
    run_in_process_group(in_distributed_data_parallel)


def test_train_and_eval_switch_dropout_and_branch_statistics() -> None:
    model = small()
    x = torch.randn(2, 3, 32, 32)
    statistics = model.blocks[0].lite.bn1.running_mean.clone()
    assert not torch.equal(model(x), model(x))
    assert not torch.equal(model.blocks[0].lite.bn1.running_mean, statistics)
    statistics = model.blocks[0].lite.bn1.running_mean.clone()
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model.blocks[0].lite.bn1.running_mean, statistics)


def test_another_size_after_conversion() -> None:
    model = small().eval()
    assert model(torch.randn(1, 3, 47, 50)).shape == (1, 4)


def test_the_report_prints_every_layer() -> None:
    text = str(conversion_report(small()))
    for line in ("SmallNet converted for 'lite_residual+bias'", "head: fc", "stem.1 folded, ReLU6 fused", "blocks.1"):
        assert line in text
    assert "8 -> 8, stride 1, pooling 2, 5x5, resolution 16" in text
