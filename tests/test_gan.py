"""The generator, the critic, their training, and the score."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from bnlib import gan

IMAGES = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(12) % 10


def pair(**kinds):
    torch.manual_seed(1)
    return gan.Generator(latent=5, channels=3, **kinds), gan.Critic(channels=2, **kinds)


class Conditional(nn.BatchNorm2d):
    """Adds the label to what batch norm returns: enough to see that it arrived."""

    def forward(self, x, labels):
        return super().forward(x) + labels[:, None, None, None]


class TestNetworks:
    def test_a_generator_draws_images_in_the_range_of_tanh(self):
        images = pair()[0](torch.randn(4, 5))
        assert images.shape == (4, 1, 28, 28)
        assert images.abs().max() <= 1

    def test_a_critic_gives_each_image_a_score(self):
        assert pair()[1](IMAGES).shape == (12,)

    def test_the_factory_makes_every_norm(self):
        generator, critic = pair(norm=lambda channels: nn.GroupNorm(1, channels))
        norms = [m for m in (*generator.modules(), *critic.modules()) if type(m) is nn.GroupNorm]
        assert [norm.num_channels for norm in norms] == [6, 3, 4]

    def test_identity_leaves_batch_norm_out(self):
        generator, critic = pair(norm=nn.Identity)
        assert not [*generator.buffers(), *critic.buffers()]
        whole = critic(IMAGES)
        torch.testing.assert_close(critic(IMAGES[:3]), whole[:3])

    def test_labels_reach_the_norms(self):
        generator, _ = pair(norm=Conditional)
        z = torch.randn(4, 5)
        zero, one = (generator(z, torch.full((4,), label)) for label in (0, 1))
        assert (zero - one).abs().min() > 0

    def test_a_projection_critic_adds_a_product_with_the_embedding(self):
        critic = gan.Critic(channels=2, classes=10)
        hidden = []
        critic.score.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        without = critic(IMAGES, LABELS)  # the embedding starts at zero
        nn.init.normal_(critic.embedding.weight)
        product = (critic.embedding.weight[LABELS] * hidden[0]).sum(1)
        torch.testing.assert_close(critic(IMAGES, LABELS), without + product)
        assert product.abs().min() > 0

    @pytest.mark.parametrize(("classes", "labels"), [(None, LABELS), (10, None)])
    def test_labels_go_with_classes(self, classes, labels):
        with pytest.raises(ValueError, match="if, and only if"):
            gan.Critic(channels=2, classes=classes)(IMAGES, labels)


class TestLosses:
    scores = torch.linspace(-4, 4, 9, dtype=torch.float64)

    def test_equal_binary_cross_entropy(self):
        bce = nn.functional.binary_cross_entropy_with_logits
        ones, zeros = torch.ones_like(self.scores), torch.zeros_like(self.scores)
        expected = bce(self.scores, ones) + bce(self.scores + 1, zeros)
        torch.testing.assert_close(gan.critic_loss(self.scores, self.scores + 1), expected)
        torch.testing.assert_close(gan.generator_loss(self.scores), bce(self.scores, ones))


class TestTrain:
    def test_returns_two_losses_a_step_and_moves_both(self):
        generator, critic = pair()
        before = [p.clone() for p in (*generator.parameters(), *critic.parameters())]
        seen = []
        losses = gan.train(generator, critic, IMAGES, 3, batch_size=4, callback=seen.append)
        assert losses.shape == (3, 2)
        assert np.isfinite(losses).all()
        assert seen == [1, 2, 3]
        after = (*generator.parameters(), *critic.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_the_critic_sees_three_batches_a_step_and_the_generator_makes_one(self):
        generator, critic = pair()
        gan.train(generator, critic, IMAGES, 5, batch_size=4)
        assert generator.norm1.num_batches_tracked == 5
        assert critic.norm.num_batches_tracked == 15

    def test_a_seed_repeats_it_whatever_the_global_state(self):
        losses = []
        for extra in range(2):
            generator, critic = pair()
            torch.rand(extra)
            losses.append(gan.train(generator, critic, IMAGES, 2, batch_size=4, seed=7))
        assert (losses[0] == losses[1]).all()

    def test_equals_the_same_steps_written_out(self):
        generator, critic = pair()
        losses = gan.train(generator, critic, IMAGES, 1, batch_size=12, seed=3, lr=0.1)
        theirs, judge = pair()
        rng = torch.Generator().manual_seed(3)
        real = IMAGES[torch.randperm(12, generator=rng)]
        fake = theirs(torch.randn(12, 5, generator=rng))
        bce = nn.functional.binary_cross_entropy_with_logits
        adam = torch.optim.Adam(judge.parameters(), 0.1, (0.5, 0.999))
        loss = bce(judge(real), torch.ones(12)) + bce(judge(fake.detach()), torch.zeros(12))
        loss.backward()
        adam.step()
        np.testing.assert_allclose(losses[0, 0], loss.item(), rtol=1e-6)
        torch.testing.assert_close(critic.state_dict()["down1.weight"], judge.down1.weight.data)
        np.testing.assert_allclose(losses[0, 1], bce(judge(fake), torch.ones(12)).item(), rtol=1e-5)

    def test_labels_of_the_real_batch_go_to_all(self):
        generator, _ = pair(norm=Conditional)
        critic = gan.Critic(channels=2, classes=10)
        losses = gan.train(generator, critic, IMAGES, 2, labels=LABELS, batch_size=4)
        assert np.isfinite(losses).all()

    @pytest.mark.parametrize(
        ("steps", "options", "message"),
        [
            (0, {}, "steps from 1"),
            (1, {"batch_size": 13}, "batch_size from 2 to 12"),
            (1, {"batch_size": 1}, "batch_size from 2 to 12"),
            (1, {"batch_size": 4, "labels": LABELS[:3]}, "one label per image"),
        ],
    )
    def test_bad_input_is_refused_before_anything_moves(self, steps, options, message):
        generator, critic = pair()
        generator.eval()
        with pytest.raises(ValueError, match=message):
            gan.train(generator, critic, IMAGES, steps, **options)
        assert not generator.training
        assert critic.norm.num_batches_tracked == 0


class TestSample:
    @pytest.mark.parametrize("training", [True, False])
    def test_an_image_does_not_depend_on_its_companions(self, training):
        generator = pair()[0].train(training)
        z = torch.randn(4, 5)
        images = gan.sample(generator, z)
        torch.testing.assert_close(gan.sample(generator, z[:1]), images[:1])
        assert generator.training is training
        assert generator.norm1.num_batches_tracked == 0
        assert not images.requires_grad


class TestScorer:
    def test_learns_and_leaves_the_global_random_state(self):
        images = torch.zeros(200, 1, 28, 28) - 1
        labels = torch.arange(200) % 10
        images[torch.arange(200), 0, labels * 2, labels * 2] = 1  # a dot for each class
        state = torch.get_rng_state()
        scorer = gan.train_scorer(images, labels, epochs=30)
        assert torch.equal(torch.get_rng_state(), state)
        assert not scorer.training
        assert (scorer(images).argmax(1) == labels).float().mean() > 0.9
        found = gan.features(scorer, images)
        assert (found.shape, found.dtype) == ((200, 32), np.float64)

    def test_wants_a_label_for_each_image(self):
        with pytest.raises(ValueError, match=r"one label per image, \(12,\), got \(3,\)"):
            gan.train_scorer(IMAGES, LABELS[:3])


class TestFrechetDistance:
    rng = np.random.default_rng(0)
    a = rng.normal(3, 2, (50, 6)) @ rng.normal(size=(6, 6))
    b = rng.gamma(2, 3, (40, 6))

    def test_equals_the_formula_with_scipys_matrix_root(self):
        cov_a, cov_b = np.cov(self.a.T), np.cov(self.b.T)
        root = scipy.linalg.sqrtm(cov_a @ cov_b).real
        shift = self.a.mean(0) - self.b.mean(0)
        expected = shift @ shift + np.trace(cov_a + cov_b - 2 * root)
        np.testing.assert_allclose(gan.frechet_distance(self.a, self.b), expected, rtol=1e-9)

    def test_of_one_feature_is_that_of_two_normal_distributions(self):
        a, b = self.a[:, :1], self.b[:, :1]
        expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
        np.testing.assert_allclose(gan.frechet_distance(a, b), expected, rtol=1e-9)

    def test_is_symmetric_and_zero_to_itself(self):
        there, back = gan.frechet_distance(self.a, self.b), gan.frechet_distance(self.b, self.a)
        np.testing.assert_allclose(there, back, rtol=1e-9)
        assert gan.frechet_distance(self.a, self.a) < 1e-9 * np.trace(np.cov(self.a.T))

    def test_takes_fewer_examples_than_features(self):
        few = gan.frechet_distance(self.a[:3], self.b[:3])
        assert np.isfinite(few)
        assert few > 0

    @pytest.mark.parametrize("b", [np.ones((4, 5)), np.ones(6), np.ones((1, 6))])
    def test_other_shapes_are_refused(self, b):
        with pytest.raises(ValueError, match="expected two sets of 2 or more features"):
            gan.frechet_distance(self.a, b)
