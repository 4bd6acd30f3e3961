"""The loss, the optimizer and the loop against PyTorch, step for step."""

import subprocess
import sys
from queue import Empty

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client.manager import start_new_kernel

from bnlib.data import digits
from bnlib.scratch import training
from bnlib.scratch.layers import BatchNorm, Linear, ReLU, Sequential, Sigmoid
from bnlib.scratch.training import SGD, fit, softmax_cross_entropy

RULES = [
    {"learning_rate": 0.5},
    {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.02},
    {"learning_rate": 0.3, "weight_decay": 0.1},
]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(dtype=np.float64, hidden=20, seed=0):
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(784, hidden, dtype=dtype, rng=rng),
        BatchNorm(hidden, dtype=dtype),
        Sigmoid(),
        Linear(hidden, hidden, dtype=dtype, rng=rng),
        BatchNorm(hidden, dtype=dtype),
        ReLU(),
        Linear(hidden, 10, dtype=dtype, rng=rng),
    )


def torch_network(ours, dtype=torch.float64, hidden=20):
    nn = torch.nn
    theirs = nn.Sequential(
        nn.Linear(784, hidden),
        nn.BatchNorm1d(hidden),
        nn.Sigmoid(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    ).to(dtype)
    state = ours.state_dict()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return theirs


def torch_losses(theirs, images, labels, rule, steps, batch_size, rng):
    """Train PyTorch's network on the batches that `fit` draws from the same rng."""
    options = {name: value for name, value in rule.items() if name != "learning_rate"}
    optimizer = torch.optim.SGD(theirs.parameters(), lr=rule["learning_rate"], **options)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    losses, batches = [], []
    while len(losses) < steps:
        if not batches:
            order = torch.from_numpy(rng.permutation(len(images)))
            batches = [b for b in order.split(batch_size) if len(b) == batch_size]
        batch = batches.pop(0)
        loss = torch.nn.functional.cross_entropy(theirs(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def data(dtype, n):
    images, labels = digits()
    return images[:n].reshape(n, -1).astype(dtype), labels[:n]


@pytest.mark.parametrize("rule", RULES)
def test_sixty_steps_have_the_losses_of_pytorch(rule):
    images, labels = data(np.float64, 500)  # 15 batches of 32 an epoch, 20 images left out
    ours = network()
    theirs = torch_network(ours)
    batches = {"batch_size": 32, "rng": np.random.default_rng(7)}
    losses = fit(ours, images, labels, SGD(ours, **rule), epochs=4, **batches)
    batches["rng"] = np.random.default_rng(7)
    expected = torch_losses(theirs, images, labels, rule, 60, **batches)
    assert len(losses) == 60
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-10)  # reached: about 1e-15
    assert losses[-1] < 0.7 * losses[0]  # the network learns: the losses are not all alike
    for name, tensor in theirs.state_dict().items():
        array = ours.state_dict()[name]
        np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_in_float32_the_losses_stay_close_to_those_of_pytorch(rule):
    images, labels = data(np.float32, 320)
    ours = network(np.float32)
    theirs = torch_network(ours, torch.float32)
    batches = {"batch_size": 32, "rng": np.random.default_rng(7)}
    losses = fit(ours, images, labels, SGD(ours, **rule), epochs=2, **batches)
    batches["rng"] = np.random.default_rng(7)
    expected = torch_losses(theirs, images, labels, rule, 20, **batches)
    # both round at 6e-8; reached after 20 steps, over three seeds: 2e-7
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert {p.dtype for p in ours.parameters().values()} == {np.dtype(np.float32)}
    assert {g.dtype for g in ours.grads.values()} == {np.dtype(np.float32)}


class TestLoss:
    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(1, 6),
        k=st.integers(1, 5),
        scale=st.sampled_from([1e-3, 1, 100, 1e5]),
        dtype=st.sampled_from([np.float32, np.float64]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_it_matches_pytorch_for_any_shape_and_scale(self, n, k, scale, dtype, seed):
        rng = np.random.default_rng(seed)
        scores = (scale * rng.standard_normal((n, k)) + scale).astype(dtype)
        labels = rng.integers(0, k, n)
        tensor = torch.from_numpy(scores.astype(np.float64)).requires_grad_()
        expected = torch.nn.functional.cross_entropy(tensor, torch.from_numpy(labels))
        expected.backward()
        scores.flags.writeable = labels.flags.writeable = False
        loss, dscores = softmax_cross_entropy(scores, labels)
        assert type(loss) is float
        assert dscores.dtype == dtype
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-12, atol=1e-12)
        # float32 rounds the gradient once, at the end
        close = 1e-12 if dtype == np.float64 else 1e-7
        np.testing.assert_allclose(dscores, tensor.grad.numpy(), rtol=close, atol=close)

    def test_its_gradient_matches_central_differences(self):
        rng = np.random.default_rng(0)
        scores, labels = rng.normal(1, 3, (4, 3)), rng.integers(0, 3, 4)
        _, dscores = softmax_cross_entropy(scores, labels)
        for i in np.ndindex(scores.shape):
            h = np.zeros_like(scores)
            h[i] = 1e-5
            above = softmax_cross_entropy(scores + h, labels)[0]
            below = softmax_cross_entropy(scores - h, labels)[0]
            assert abs((above - below) / 2e-5 - dscores[i]) < 1e-9

    def test_huge_scores_do_not_overflow(self):
        loss, dscores = softmax_cross_entropy(np.array([[1e6, 0.0], [-1e6, 0.0]]), [0, 0])
        assert loss == 5e5
        np.testing.assert_array_equal(dscores, [[0, 0], [-0.5, 0.5]])

    def test_labels_may_be_a_list_or_any_integers(self):
        scores = np.random.default_rng(0).normal(size=(2, 3))
        loss, _ = softmax_cross_entropy(scores, [2, 0])
        assert softmax_cross_entropy(scores, np.array([2, 0], np.uint8))[0] == loss


class TestSGD:
    @pytest.mark.parametrize("rule", RULES)
    def test_it_changes_the_models_own_arrays_and_leaves_the_gradients(self, rule):
        model = Linear(3, 2, rng=np.random.default_rng(0))
        weight = model.weight
        model(np.ones((4, 3), np.float32))
        model.backward(np.ones((4, 2), np.float32))
        before, grads = weight.copy(), {n: g.copy() for n, g in model.grads.items()}
        SGD(model, **rule).step()
        g = grads["weight"] + rule.get("weight_decay", 0) * before
        np.testing.assert_allclose(weight, before - rule["learning_rate"] * g, rtol=1e-6)
        for name, grad in model.grads.items():
            np.testing.assert_array_equal(grad, grads[name])

    def test_the_numbers_may_change_between_steps(self):
        ours = network(hidden=4)
        theirs = torch_network(ours, hidden=4)
        x, dy = np.random.default_rng(0).normal(1, 2, (2, 8, 784))
        dy = dy[:, :10]
        optimizer = SGD(ours, 0.1, momentum=0.9)
        reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
        for learning_rate in (0.1, 0.01, 0.2):
            optimizer.learning_rate = reference.param_groups[0]["lr"] = learning_rate
            ours(x)
            ours.backward(dy)
            optimizer.step()
            reference.zero_grad()
            theirs(torch.from_numpy(x)).backward(torch.from_numpy(dy))
            reference.step()
        for name, tensor in theirs.named_parameters():
            expected = tensor.detach().numpy()
            # the last bits of a matrix product differ, and batch norm magnifies them a little
            np.testing.assert_allclose(ours.parameters()[name], expected, rtol=1e-8, atol=1e-8)

    def test_a_step_without_gradients_moves_nothing(self):
        model = network(hidden=4)
        before = model.state_dict()
        model.grads = {"0.weight": np.ones((4, 784))}
        with pytest.raises(RuntimeError, match=r"gradients for 0.bias, 1.weight.*backward first"):
            SGD(model, 0.1).step()
        for name, array in model.state_dict().items():
            np.testing.assert_array_equal(array, before[name])


class TestFit:
    def test_each_epoch_sees_every_image_once_but_for_the_rest(self):
        seen = []

        class Watched(Linear):
            def forward(self, x):
                seen.append(x[:, 0].astype(int).tolist())
                return super().forward(x)

        model = Watched(1, 2, rng=np.random.default_rng(0))
        images = np.arange(11, dtype=np.float32)[:, None]
        images.flags.writeable = False
        run = {"epochs": 3, "batch_size": 4, "rng": np.random.default_rng(0)}
        losses = fit(model, images, np.zeros(11, int), SGD(model, 0.0), **run)
        assert len(losses) == len(seen) == 6  # 11 // 4 batches an epoch
        assert all(len(batch) == 4 for batch in seen)
        epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
        assert all(len(set(epoch)) == 8 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3  # a new order each time

    def test_the_model_trains_in_training_mode(self):
        model = network(hidden=4).eval()
        images, labels = data(np.float64, 8)
        run = {"epochs": 2, "batch_size": 4, "rng": np.random.default_rng(0)}
        fit(model, images, labels, SGD(model, 0.1), **run)
        assert model.training
        assert model.layers[1].num_batches_tracked == 4

    def test_images_of_any_shape_reach_the_model_as_they_are(self):
        model = Sequential(BatchNorm(3), Flatten(), Linear(12, 2, rng=np.random.default_rng(0)))
        images = np.random.default_rng(0).normal(size=(8, 3, 2, 2)).astype(np.float32)
        run = {"epochs": 1, "batch_size": 4, "rng": np.random.default_rng(0)}
        assert len(fit(model, images, np.ones(8, int), SGD(model, 0.1), **run)) == 2

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"labels": np.zeros(7, int)}, ValueError, "got 8 images and 7 labels"),
            ({"epochs": 0}, ValueError, "epochs from 1 and .* got 0 and 4"),
            ({"batch_size": 0}, ValueError, "batch_size from 1 to 8, got 1 and 0"),
            ({"batch_size": 9}, ValueError, "batch_size from 1 to 8, got 1 and 9"),
            ({"optimizer": SGD(network(hidden=4), 0.1)}, ValueError, "optimizer of this model"),
        ],
    )
    def test_bad_input_is_named_before_anything_moves(self, change, error, message):
        model = network(hidden=4).eval()
        before = model.state_dict()
        images, labels = data(np.float64, 8)
        good = {"labels": labels, "optimizer": SGD(model, 0.1), "epochs": 1, "batch_size": 4}
        with pytest.raises(error, match=message):
            fit(model, images, **{**good, **change}, rng=np.random.default_rng(0))
        assert not model.training
        for name, array in model.state_dict().items():
            np.testing.assert_array_equal(array, before[name])


class Flatten(ReLU):
    def forward(self, x):
        self.shape = x.shape
        return super().forward(x.reshape(len(x), -1))

    def backward(self, dy):
        return super().backward(dy).reshape(self.shape)


SCORES = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax_cross_entropy(SCORES, [0, 3]), ValueError, "from 0 to 2, .* got 0 to 3"),
        (lambda: softmax_cross_entropy(SCORES, [-1, 2]), ValueError, "from 0 to 2, .* got -1 to 2"),
        (lambda: softmax_cross_entropy(SCORES, [0]), ValueError, r"shape \(2,\), got shape \(1,\)"),
        (lambda: softmax_cross_entropy(SCORES, [[0], [1]]), ValueError, "one label per row"),
        (lambda: softmax_cross_entropy(SCORES, [0.0, 1.0]), TypeError, "integer labels.*float64"),
        (lambda: softmax_cross_entropy(SCORES, [True, False]), TypeError, "integer labels.*bool"),
        (lambda: softmax_cross_entropy(SCORES[:0], []), ValueError, r"not empty.*\(0, 3\)"),
        (lambda: softmax_cross_entropy(SCORES[:, :0], [0, 0]), ValueError, "not empty"),
        (lambda: softmax_cross_entropy(SCORES[..., None], [0, 1]), ValueError, r"\(N, K\)"),
        (lambda: softmax_cross_entropy(SCORES[0], [0]), ValueError, "2 or more dimensions"),
        (lambda: softmax_cross_entropy(SCORES.astype(int), [0, 1]), TypeError, "scores to hold"),
        (lambda: SGD(ReLU(), -0.1), ValueError, "learning_rate at least 0 and finite, got -0.1"),
        (lambda: SGD(ReLU(), np.nan), ValueError, "learning_rate"),
        (lambda: SGD(ReLU(), np.inf), ValueError, "learning_rate"),
        (lambda: SGD(ReLU(), 0.1, momentum=-1), ValueError, "momentum at least 0"),
        (lambda: SGD(ReLU(), 0.1, weight_decay=-1), ValueError, "weight_decay at least 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


FIT = """
import numpy as np
from bnlib.scratch.layers import Linear
from bnlib.scratch.training import SGD, fit
rng = np.random.default_rng(0)
model = Linear(3, 2, rng=rng)
images, labels = rng.normal(size=(8, 3)), np.zeros(8, int)
losses = fit(model, images, labels, SGD(model, 0.1), epochs=2, batch_size=4, rng=rng)
"""


class TestProgressBar:
    def test_no_bar_where_the_output_is_no_terminal(self):
        run = subprocess.run([sys.executable, "-c", FIT], text=True, capture_output=True)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

    def test_fit_works_without_tqdm_and_scratch_imports_without_it(self):
        no_tqdm = "import sys; sys.modules['tqdm'] = None" + FIT + "print(len(losses))"
        run = subprocess.run([sys.executable, "-c", no_tqdm], text=True, capture_output=True)
        assert (run.returncode, run.stdout, run.stderr) == (0, "4\n", "")

    def test_importing_imports_neither_tqdm_nor_torch(self):
        code = "import sys, bnlib.scratch.training; print({'tqdm', 'torch'} & {*sys.modules})"
        run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
        assert (run.returncode, run.stdout) == (0, "set()\n")

    def test_a_terminal_gets_a_bar_that_is_cleared(self, monkeypatch, capsys):
        monkeypatch.setattr(training, "_is_watched", lambda: True)
        steps = training.progress(range(3), "batch")
        assert list(steps) == [0, 1, 2]
        bar = capsys.readouterr().err
        assert "0/3" in bar
        assert bar.endswith("\r")  # the line is blank again: leave=False
        assert bar.split("\r")[-2].strip() == ""

    def test_a_notebook_shows_a_bar_to_its_reader_and_stores_none(self):
        manager, client = start_new_kernel(startup_timeout=60)
        try:
            executed_for_its_outputs = outputs(client, allow_stdin=False)
            run_by_a_reader = outputs(client, allow_stdin=True)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
        assert executed_for_its_outputs == []
        assert "0/4" in "".join(content["text"] for content in run_by_a_reader)


def outputs(client, allow_stdin):
    """Execute FIT in a kernel and return what the notebook would store."""
    client.execute(FIT, allow_stdin=allow_stdin)
    found = []
    while True:
        try:
            message = client.get_iopub_msg(timeout=30)
        except Empty:
            pytest.fail("the kernel does not answer")
        kind, content = message["msg_type"], message["content"]
        if kind in ("stream", "display_data", "execute_result", "error"):
            found.append(content)
        if kind == "status" and content["execution_state"] == "idle":
            return found
