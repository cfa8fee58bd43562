"""The penalty counts every call of a layer, in value and gradient, or says that it cannot."""

import copy
import gc
from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from divnorm_kernels import BatchNorm2d, DivisiveNorm2d, DivisiveNormFeatures, collect_l1, divisive_norm, l1_penalty

WEIGHT = 0.25


class Cell(nn.Module):
    """A recurrent network whose layer is called once a step."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = DivisiveNormFeatures(6, 3, l1_weight=WEIGHT)

    def forward(self, x):
        h, self.terms = torch.zeros_like(x[0]), []
        for step in x:
            before = step + self.linear(h)
            self.terms.append(WEIGHT * divisive_norm(before, window=3, return_l1=True)[1])
            h = self.norm(before).tanh()
        return h


class Block(nn.Module):
    """A layer between others, run by whatever is handed in; a checkpoint calls again what stands before the last."""

    def __init__(self, run=lambda function, x: function(x)):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), DivisiveNorm2d(4, 3, l1_weight=WEIGHT)
        self.run = run

    def forward(self, x):
        return self.run(lambda x: self.norm(self.convolution(x)).sigmoid(), x)


def images(*shape):
    return torch.randn(*(shape or (2, 3, 7, 7)), generator=torch.Generator().manual_seed(0))


def gradients(model, loss):
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return torch.autograd.grad(loss, list(model.parameters()), **options)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_step_of_a_recurrent_network_is_counted():
    model, x = Cell(), torch.randn(5, 4, 6)
    with collect_l1(model) as penalty:
        y = model(x)
    expected = torch.stack(model.terms).sum()
    with pytest.raises(RuntimeError, match=r"^l1_penalty: norm, a DivisiveNormFeatures, was called 5 times"):
        l1_penalty(model)
    close(penalty(), expected)
    close(gradients(model, y.sum() + penalty()), gradients(model, y.sum() + expected))


def test_a_shared_layer_is_counted_where_it_stands():
    norm = DivisiveNorm2d(3, 3, l1_weight=WEIGHT)
    model, x = nn.Sequential(norm, nn.Conv2d(3, 3, 3, padding=1), norm), images()
    with collect_l1(model) as penalty:
        y = model(x)
    with pytest.raises(RuntimeError, match=r"^l1_penalty: 0, a DivisiveNorm2d, was called 2 times"):
        l1_penalty(model)
    inputs = (x, model[1](divisive_norm(x, window=3)))
    close(penalty(), sum(WEIGHT * divisive_norm(t, window=3, return_l1=True)[1] for t in inputs))
    y.sum().backward()
    model.eval()(x)
    assert l1_penalty(model) == 0


def test_collectors_count_what_is_called_inside_of_them():
    model, x = nn.Sequential(DivisiveNorm2d(3, 3, l1_weight=1.0), BatchNorm2d(3, l1_weight=0.5)), images()
    model(x)
    with collect_l1(model) as outer:
        model(x)
        with collect_l1(model[1]) as inner:
            model(2 * x)
        model.eval()(x)
        model.train()
    model(x)
    one, two = (divisive_norm(scale * x, window=3, return_l1=True)[1] for scale in (1, 2))
    rows = [divisive_norm(model[0](s * x), window="all", groups=3, over_batch=True, return_l1=True)[1] for s in (1, 2)]
    close(inner(), 0.5 * rows[1])
    close(outer(), one + two + 0.5 * (rows[0] + rows[1]))


def test_a_model_without_a_penalty_collects_a_zero_that_can_be_added():
    model = nn.Linear(3, 3).double()
    with collect_l1(model) as penalty:
        y = model(torch.ones(1, 3).double())
    (y.sum() + penalty()).backward()
    assert (penalty().item(), penalty().dtype) == (0, torch.float64)


def test_one_call_a_loss_needs_no_collector():
    model, x = Block(), images()
    kept = model(x)  # its graph is gone with it
    del kept
    for step in range(4):
        loss = model(x).square().mean()
        if step % 2:
            loss = loss + l1_penalty(model)
        loss.backward()
    with torch.no_grad():
        model(x)
        assert l1_penalty(model) > 0
    first = model(x).sum() + l1_penalty(model)
    second = model(2 * x).sum() + l1_penalty(model)
    (first + second).backward()


def test_calls_whose_graphs_are_gone_are_forgotten():
    model, x = Block(), images()
    for _ in range(100):
        model(x)
    gc.collect()
    assert len(model.norm._calls.pending) <= 1


def test_what_a_checkpoint_calls_again_counts_once():
    plain, x = Block(), images()
    model = copy.deepcopy(plain)
    model.run = partial(checkpoint, use_reentrant=False)
    with collect_l1(plain) as expected:
        y = plain(x)
    expected_gradients = gradients(plain, y.square().sum() + expected())
    with collect_l1(model) as penalty:
        y = model(x)
        close(penalty(), expected())
        close(gradients(model, y.square().sum() + penalty()), expected_gradients)
        close(penalty(), expected())


def test_a_reentrant_checkpoint_has_no_gradient_to_count():
    model, x = Block(partial(checkpoint, use_reentrant=True)), images().requires_grad_()
    with collect_l1(model) as penalty:
        model(x)
    for count, name in ((penalty, "collect_l1: a layer"), (lambda: l1_penalty(model), "l1_penalty: norm, a")):
        with pytest.raises(RuntimeError, match=f"^{name}.* called without gradients.*use_reentrant=False"):
            count()
    with torch.no_grad():
        close(penalty(), WEIGHT * divisive_norm(model.convolution(x), window=3, return_l1=True)[1])


@pytest.mark.parametrize("how", ["without gradients", "frozen", "under vmap", "under grad"])
def test_a_layer_called_twice_is_not_taken_for_one_called_once(how):
    model, x = Block(), images()
    model.requires_grad_(how != "frozen")

    def loss(x):
        model(x)
        return model(2 * x).sum() + l1_penalty(model)

    call = {"under vmap": torch.func.vmap(loss), "under grad": torch.func.grad(loss)}.get(how, loss)
    x = x[None] if how == "under vmap" else x
    with torch.set_grad_enabled(how != "without gradients"):
        with pytest.raises(RuntimeError, match="was called 2 times"):
            call(x)
        for _ in range(2):
            model(images())
            with collect_l1(model) as penalty:
                model(images())
            assert penalty() > 0


def test_a_gradient_on_the_way_does_not_hide_a_call():
    """As of a gradient penalty: D of real samples, and a gradient of D elsewhere, kept or not."""
    for options in ({"create_graph": True}, {"retain_graph": True}, {}):
        for first in (True, False):
            model, x = Block(), images().requires_grad_()
            kept, passed = (model(x), model(2 * x))[:: 1 if first else -1]
            torch.autograd.grad(passed.sum(), x, **options)
            if options or first:
                with pytest.raises(RuntimeError, match="was called"):
                    l1_penalty(model)
            else:  # the first call's graph is gone, and its share with it
                close(l1_penalty(model), WEIGHT * model.norm.l1)
            del kept


def test_a_call_in_eval_mode_does_not_hide_one():
    model, x = Block(), images()
    y = model(x)
    model.eval()(x)
    with pytest.raises(RuntimeError, match="was called again after the call that counts, in eval mode"):
        l1_penalty(model.train())
    y.sum().backward()
    assert l1_penalty(model) == 0


def test_a_layer_that_the_loss_went_past_adds_nothing():
    layers, x = nn.ModuleList([Block(), Block()]), images()
    for step in range(4):
        y = sum(layer(x).square().mean() for layer in layers[: 1 + (step + 1) % 2])
        penalty = l1_penalty(layers)
        expected = sum(WEIGHT * layer.norm.l1 for layer in layers[: 1 + (step + 1) % 2])
        close(penalty, expected)
        (y + penalty).backward()
        before = l1_penalty(layers)
    close(before, sum(WEIGHT * layer.norm.l1 for layer in layers))


def test_replicas_are_counted():
    """As torch.nn.DataParallel makes them, each in a thread."""
    model, x = DivisiveNorm2d(3, 3, l1_weight=WEIGHT), images(4, 3, 5, 5)
    replicas = [model._replicate_for_data_parallel() for _ in range(2)]
    for replica in replicas:
        replica.weight, replica.bias = model.weight, model.bias
    with collect_l1(model) as penalty:
        threads = [Thread(target=replica, args=(share,)) for replica, share in zip(replicas, x.chunk(2), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    close(penalty(), sum(WEIGHT * divisive_norm(share, window=3, return_l1=True)[1] for share in x.chunk(2)))
    with pytest.raises(RuntimeError, match=r"^l1_penalty: the model, a DivisiveNorm2d, was called in replicas"):
        l1_penalty(model)
    model(x)
    assert l1_penalty(model) > 0


@pytest.mark.parametrize("count", [lambda model: collect_l1(model), None], ids=["collect_l1", "l1_penalty"])
def test_transformations(count):
    model, x = Block(), images(3, 3, 7, 7)

    def loss(x):
        if count is None:
            return model(x[None]).sum() + l1_penalty(model)
        with count(model) as penalty:
            return model(x[None]).sum() + penalty()

    expected = torch.stack([loss(one) for one in x])
    close(torch.func.vmap(loss)(x), expected)
    close(torch.func.grad(loss)(x[0]), torch.autograd.functional.jacobian(loss, x[0]))
    with collect_l1(model) as penalty:
        torch.func.vmap(lambda one: model(one[None]))(x)
    for name, late in (("collect_l1", penalty), ("l1_penalty", lambda: l1_penalty(model))):
        with pytest.raises(
            RuntimeError, match=f"^{name}: a layer was called under a transformation of torch.func that"
        ):
            late()


def test_compiled_models_are_counted_without_another_compilation():
    counter = CompileCounter()
    norm = DivisiveNorm2d(3, 3, l1_weight=WEIGHT)
    model, x = nn.Sequential(norm, norm), images()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = sum(WEIGHT * divisive_norm(t, window=3, return_l1=True)[1] for t in (x, norm(x).detach()))
    for _ in range(4):
        with collect_l1(compiled) as penalty:
            y = compiled(x)
        close(penalty(), expected)
        (y.sum() + penalty()).backward()
    assert counter.frame_count == 1


def test_the_block_itself_can_be_compiled():
    norm, x = DivisiveNorm2d(3, 3, l1_weight=WEIGHT), images()

    def loss(x):
        with collect_l1(norm) as penalty:
            y = norm(norm(x))
        return y.sum() + penalty()

    close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))
