"""A small DCGAN for 28 × 28 digits, its training loop, and a score for what it draws.

    generator, critic = Generator(), Critic()
    losses = train(generator, critic, images, steps=800)
    pictures = sample(generator, torch.randn(40, 64))
    frechet_distance(features(scorer, pictures), features(scorer, images))

Images are floats of shape (N, 1, 28, 28), -1 for paper and 1 for ink: the range of tanh. Where the
batch norms stand is an argument, so that they can be left out, moved and replaced.

Source: Radford, Metz and Chintala (2016), "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", section 3; sizes and learning rate are ours.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu, relu, softplus

from bnlib.scratch.training import progress
from bnlib.statistics import evaluating

Norm = Callable[[int], nn.Module]


class Generator(nn.Module):
    """Draw digits: a linear layer to 7 × 7 places, and two transposed convolutions to 28 × 28.

    latent: how many numbers a latent point has. channels: those of the 14 × 14 places; the 7 × 7
    have twice as many. norm: makes the two layers norm1 and norm2 from a number of channels;
    nn.Identity leaves them out. The initial weights are PyTorch's defaults.
    """

    def __init__(
        self, latent: int = 64, channels: int = 32, *, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.latent = latent
        self.project = nn.Linear(latent, 2 * channels * 7 * 7)
        self.norm1 = norm(2 * channels)
        self.up1 = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.norm2 = norm(channels)
        self.up2 = nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images, shape (N, 1, 28, 28), in (-1, 1).

        z: latent points, shape (N, latent). labels: integers, shape (N,), for norms that take them,
        such as conditional batch norm; each norm is then called with (x, labels).
        """
        given = () if labels is None else (labels,)
        x = self.project(z).unflatten(1, (-1, 7, 7))
        x = relu(self.norm1(x, *given))
        x = relu(self.norm2(self.up1(x), *given))
        return torch.tanh(self.up2(x))


class Critic(nn.Module):
    """Tell real digits from generated ones: two convolutions and a linear layer.

    channels: those of the 14 × 14 places; the 7 × 7 have twice as many. norm: makes the one norm
    from a number of channels; nn.Identity leaves it out. classes: how many classes a projection
    critic knows, which then takes labels; None makes one that knows none.

    Source of the projection: Miyato and Koyama (2018), "cGANs with Projection Discriminator".
    """

    def __init__(
        self, channels: int = 16, *, norm: Norm = nn.BatchNorm2d, classes: int | None = None
    ) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, channels, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.norm = norm(2 * channels)
        self.score = nn.Linear(2 * channels * 7 * 7, 1)
        self.embedding = None if classes is None else nn.Embedding(classes, self.score.in_features)
        if self.embedding is not None:
            nn.init.zeros_(self.embedding.weight)  # at first every class is judged alike

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a score for each image, shape (N,): above 0 says real.

        images: shape (N, 1, 28, 28). labels: integers, shape (N,), for a critic made with classes.
        Raises ValueError if labels are given to a critic without classes, or not to one with them.
        """
        if (labels is None) != (self.embedding is None):
            raise ValueError("expected labels if, and only if, the critic was made with classes")
        x = leaky_relu(self.down1(images), 0.2)
        x = leaky_relu(self.norm(self.down2(x)), 0.2).flatten(1)
        scores: Tensor = self.score(x).squeeze(1)
        if self.embedding is not None:
            scores = scores + (self.embedding(labels) * x).sum(1)
        return scores


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return how wrong the critic is about real and generated images, from its scores for both.

    It is -log p(real) for the real ones plus -log(1 - p(real)) for the others, each averaged, with
    p(real) the logistic function of the score. Source: Goodfellow et al. (2014), equation 1.
    """
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Return how little the critic took generated images for real, from its scores: -log p(real).

    The non-saturating loss. Source: Goodfellow et al. (2014), section 3.
    """
    return softplus(-fake).mean()


def train(
    generator: Generator,
    critic: nn.Module,
    images: Tensor,
    steps: int,
    *,
    labels: Tensor | None = None,
    lr: float = 2e-3,
    batch_size: int = 64,
    seed: int = 0,
    callback: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Train both in turn, and return the losses of critic and generator, shape (steps, 2).

    images: as the module's first lines say. labels: integers, shape (n,), for a conditional pair;
    generated images get those of the real batch. lr: Adam's, with beta1 0.5. seed: of the batches
    and the latent points; the initial weights are the caller's. callback: called after every step
    with the number of steps done. The critic sees real and generated images in separate batches.
    Both stay in training mode. A bar shows the progress where someone can see it.

    Raises ValueError before any step if steps is below 1, batch_size not 2 to n, or there is not
    one label per image.
    Source: Radford, Metz and Chintala (2016), section 4, but for lr.
    """
    n = len(images)
    if steps < 1 or not 2 <= batch_size <= n:
        wrong = f"{steps} and {batch_size}"
        raise ValueError(f"expected steps from 1 and batch_size from 2 to {n}, got {wrong}")
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"expected one label per image, ({n},), got {tuple(labels.shape)}")
    rng, device = torch.Generator().manual_seed(seed), images.device
    adam_g, adam_c = (
        torch.optim.Adam(m.parameters(), lr, betas=(0.5, 0.999)) for m in (generator, critic)
    )
    generator.train()
    critic.train()
    losses = []
    for step in progress(range(steps), "step"):
        rows = torch.randperm(n, generator=rng)[:batch_size].to(device)
        given = () if labels is None else (labels[rows],)
        z = torch.randn(batch_size, generator.latent, generator=rng).to(device)
        fakes = generator(z, *given)

        loss_c = critic_loss(critic(images[rows], *given), critic(fakes.detach(), *given))
        adam_c.zero_grad()
        loss_c.backward()  # type: ignore[no-untyped-call]
        adam_c.step()

        loss_g = generator_loss(critic(fakes, *given))
        adam_g.zero_grad()
        loss_g.backward()  # type: ignore[no-untyped-call]
        adam_g.step()

        losses.append((loss_c.item(), loss_g.item()))
        if callback is not None:
            callback(step + 1)
    return np.array(losses)


@torch.no_grad()
def sample(generator: nn.Module, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the generator's images for latent points, in evaluation mode, without gradients.

    Arguments: those of `Generator.forward`. Afterwards every module is in the mode it was in.
    """
    with evaluating(generator):
        images: Tensor = generator(z) if labels is None else generator(z, labels)
    return images


class Scorer(nn.Module):
    """Read digits: the classifier whose last hidden layer, 32 numbers, measures images.

    It has no batch norm, so that the features of an image do not depend on modes or companions, and
    leaky ReLUs, so that none of the 32 features is dead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 32),
            nn.LeakyReLU(0.1),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return ten scores an image, shape (N, 10), for images of shape (N, 1, 28, 28)."""
        scores: Tensor = self.head(self.body(images))
        return scores


def train_scorer(
    images: Tensor, labels: Tensor, *, epochs: int = 6, batch_size: int = 64, seed: int = 0
) -> Scorer:
    """Return a classifier trained on digits with Adam, in evaluation mode.

    images: shape (n, 1, 28, 28). labels: integers 0 to 9, shape (n,). seed: of the initial weights
    and the batches. PyTorch's global random state stays as it was.
    Raises ValueError if there is not one label per image.
    """
    n = len(images)
    if labels.shape != (n,):
        raise ValueError(f"expected one label per image, ({n},), got {tuple(labels.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = Scorer().to(images.device)
        adam = torch.optim.Adam(scorer.parameters(), 2e-3)
        for _ in progress(range(epochs), "epoch"):
            order = torch.randperm(n).to(images.device)
            for start in range(0, n, batch_size):
                rows = order[start : start + batch_size]
                loss = cross_entropy(scorer(images[rows]), labels[rows])
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
    return scorer.eval()


@torch.no_grad()
def features(scorer: Scorer, images: Tensor) -> NDArray[np.float64]:
    """Return the scorer's last hidden layer for images, float64, shape (N, 32)."""
    found: NDArray[np.float64] = scorer.body(images).double().cpu().numpy()
    return found


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Return the squared Fréchet distance between two sets of features, taken for two Gaussians.

    a, b: floats, shapes (n, d) and (m, d), n and m at least 2. With their means and covariances it
    is |mean_a - mean_b|² + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), at least 0. Computed in
    float64. Raises ValueError for other shapes.

    Source: Dowson and Landau (1982), "The Fréchet distance between multivariate normal
    distributions"; Heusel et al. (2017), "GANs Trained by a Two Time-Scale Update Rule", section 4.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        wrong = f"{a.shape} and {b.shape}"
        raise ValueError(f"expected two sets of 2 or more features of one length, got {wrong}")
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # The product has the eigenvalues of the symmetric root_a cov_b root_a, which are real.
    values, vectors = np.linalg.eigh(np.atleast_2d(cov_a))
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.linalg.eigvalsh(root_a @ np.atleast_2d(cov_b) @ root_a)
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    spread = np.trace(np.atleast_2d(cov_a + cov_b)) - 2 * np.sqrt(both.clip(0)).sum()
    return max(float(shift + spread), 0.0)
