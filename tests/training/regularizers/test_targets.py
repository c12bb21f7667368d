import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.inputs import Cutout, MixingKey
from fedsim.models.layers.keyed import key_names, mixes_examples
from fedsim.models.zoo import MODELS
from fedsim.records import Examples
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork, gradient, layer_inputs
from fedsim.training.losses import cross_entropy, smoothed_cross_entropy
from fedsim.training.mixup import mixup as mixed
from fedsim.training.objective import PLAIN
from fedsim.training.optimizers import sgd
from fedsim.training.regularizers import bind
from fedsim.training.regularizers.targets import cutout, label_smoothing, mixup

IMAGE = (1, 8, 8)


def work_of(model: nn.Module, *regularizers) -> LocalWork:
    objective = bind(model, regularizers)
    return LocalWork(model.double().train(), key_names(model), sgd(lr=0.1), fedavg().local, 1, 4, objective=objective)


def batch(n: int = 5) -> Examples:
    return Examples(rng.normal(1, n, *IMAGE, dtype=torch.float64), (rng.uniform(2, n) * 3).long())


@pytest.mark.parametrize("name", ["cnn", "resnet-8", "mlp", "linear"])
def test_both_come_before_everything_else_and_change_no_name(name):
    plain, model = MODELS[name](IMAGE, 3), MODELS[name](IMAGE, 3)
    objective = bind(model, [cutout(), mixup()])
    assert p.of(model)[0].keys() == p.of(plain)[0].keys()
    assert set(key_names(model)) == {"cutout.key", "mixup.key"}
    assert objective.mixing is not None and objective.mixing[0] == "mixup.key"
    assert {type(module) for module in [*model.children()][:2]} == {Cutout, MixingKey}
    assert objective.told()[-1] == "fedsim.training.mixup.mixup" and not mixes_examples(model)


def test_cutout_cuts_the_inputs_of_any_model():
    class Plain(nn.Module):
        """No ``nn.Sequential``, so that a hook does it."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 3)

        def forward(self, x):
            return self.head(x.flatten(1))

    for model in (Plain(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))):
        bind(model, [cutout(length=5)])
        x = batch().inputs.float()
        weights = dict(model.named_parameters())
        keyed = functional_call(model, {"cutout.key": torch.tensor(9)}, (x,))
        cut = functional_call(Cutout(5), {"key": torch.tensor(9)}, (x,))
        expected = cut.flatten(1) @ next(t for n, t in weights.items() if "weight" in n).T
        expected = expected + next(t for n, t in weights.items() if "bias" in n)
        assert torch.allclose(keyed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_with_mixup_goes_down_the_loss_of_the_mixed_batch(smoothing):
    work = work_of(
        MODELS["cnn"](IMAGE, 3, channels=[3], kernel=3, hidden=5), mixup(alpha=0.7), label_smoothing(epsilon=smoothing)
    )
    given, examples, params = layer_inputs(work, 21, 1), batch(), p.of(work.model)[0]
    grads, loss = gradient(work, params, {}, examples, given)
    found = mixed(examples.inputs, examples.labels, given["mixup.key"], alpha=0.7)
    assert 0.01 < found.share < 0.99
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    log_p = functional_call(work.model.eval(), leaves, (found.inputs,)).log_softmax(1)
    share, onehot = found.share, torch.eye(3, dtype=torch.float64)
    target = share * onehot[examples.labels] + (1 - share) * onehot[found.partners]
    expected = -(((1 - smoothing) * target + smoothing / 3) * log_p).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    slopes = torch.autograd.grad(expected, [*leaves.values()])
    assert all(torch.allclose(grads[n], g, rtol=1e-9, atol=1e-13) for n, g in zip(leaves, slopes, strict=True))


def test_of_strength_0_nothing_is_left():
    model = MODELS["cnn"](IMAGE, 3)
    before = str(model)
    assert bind(model, [cutout(length=0), mixup(alpha=0.0), label_smoothing(epsilon=0.0)]) == PLAIN
    assert str(model) == before


def test_tokens_and_a_second_mixing_are_refused():
    tokens = MODELS["char-lstm"]((5,), 7, hidden=4)
    with pytest.raises(ValueError, match="needs images; every model but char-lstm takes them"):
        bind(tokens, [cutout()])
    with pytest.raises(ValueError, match="needs inputs that can be averaged; every model but char-lstm takes them"):
        bind(tokens, [mixup()])
    with pytest.raises(ValueError, match="the batch is mixed already, by mixup"):
        bind(MODELS["mlp"](IMAGE, 3), [mixup(), mixup(alpha=1.0)])
    with pytest.raises(ValueError, match="the model has cutout already"):
        bind(MODELS["mlp"](IMAGE, 3), [cutout(), cutout(length=2)])


def test_label_smoothing_takes_the_place_of_the_loss():
    objective = bind(nn.Sequential(nn.Linear(3, 3)), [label_smoothing(epsilon=0.4)])
    logits, labels = rng.normal(1, 4, 3), torch.tensor([0, 2, -100, 1])
    assert torch.equal(objective.loss(logits, labels), smoothed_cross_entropy(logits, labels, epsilon=0.4))
    assert not torch.equal(objective.loss(logits, labels), cross_entropy(logits, labels))
