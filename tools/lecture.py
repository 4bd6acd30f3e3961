"""Write back/lecture.md: the lecture's twenty claims, with links to the cells that teach them.

Usage: python tools/lecture.py [--check]
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from execute import ROOT, find_notebooks
from notebooks import chapter_number, notebook_headings, read, tags

INTRODUCTION = """\
# The lecture's claims

The book grew out of a short video lecture, "Batch Normalization (Procedure)", from a course on
generative adversarial networks. These are its twenty claims, in our own words. Where the lecture is
brief, the book is exact: each claim says what to add, and links to the place that shows it.
"""


@dataclass(frozen=True)
class Claim:
    """A claim of the lecture, what a reader should be exact about, and the chapters that own it."""

    number: int
    title: str
    says: str
    exact: str
    chapters: tuple[int, ...]

    @property
    def tag(self) -> str:
        """The tag of the cell that teaches the claim first in a chapter."""
        return f"lecture-L{self.number}"


CLAIMS = [
    Claim(
        1,
        "A short procedure",
        "Batch normalization sounds intimidating, but it is a short procedure that you can write "
        "from scratch. The frameworks also do it for you.",
        "The whole forward pass fits in a few lines. What costs effort is the backward pass, the "
        "two modes and the edge cases.",
        (1,),
    ),
    Claim(
        2,
        "Well-behaved distributions",
        "It gives normalized values with a nice, well-behaved distribution.",
        "Normalizing moves and scales a distribution. It does not change its shape: a skewed batch "
        "stays skewed.",
        (1,),
    ),
    Claim(
        3,
        "The setting",
        "Take a network with several inputs, two hidden layers and one output, and look at one "
        "hidden layer.",
        "The book trains that network in hand-written NumPy code, on real data, with batch "
        "normalization and without it.",
        (5,),
    ),
    Claim(
        4,
        "The pre-activation",
        r"$z_i^{[l]}$ is the pre-activation of node $i$ in layer $l$. It comes from all nodes of "
        "the layer before.",
        "A batch adds one more index, the example: every value of $z$ belongs to a layer, a node "
        "and an example.",
        (1,),
    ),
    Claim(
        5,
        "Every example counts",
        "Every example in the batch counts: a batch of 32 gives 32 values of $z$ for each node.",
        "Statistics are taken per node, never across nodes. In a convolution they are taken per "
        "channel, over batch × height × width values.",
        (1,),
    ),
    Claim(
        6,
        "The batch mean and variance",
        r"Take the batch mean $\mu$ and the batch variance $\sigma^2$ of those 32 values.",
        "The variance that normalizes is the biased one, which divides by the number of values "
        "$m$. PyTorch's running variance takes the unbiased one, which divides by $m - 1$.",
        (1,),
    ),
    Claim(
        7,
        "Epsilon",
        r"$\hat z = (z - \mu) / \sqrt{\sigma^2 + \epsilon}$. Epsilon keeps the denominator from "
        "being zero.",
        r"$\epsilon$ is added to the variance, inside the root. It is $10^{-5}$ in PyTorch and "
        r"$10^{-3}$ in Keras. It shrinks $\hat z$ at a node whose variance is not much larger; in "
        "half precision a very small one rounds to zero; and with a batch of one it is all that is "
        r"left under the root, and $\hat z$ is 0 for any input.",
        (1,),
    ),
    Claim(
        8,
        "Scale and shift are learned",
        r"The scale $\gamma$ and the shift $\beta$ are parameters of the layer and are learned.",
        r"Each has a gradient of its own. They usually start at $\gamma = 1$ and $\beta = 0$. "
        "Together they can undo the normalization.",
        (2,),
    ),
    Claim(
        9,
        "The network controls the distribution",
        r"$y = \gamma \hat z + \beta$. Unlike plain normalization of the inputs, this does not "
        "force mean 0 and standard deviation 1 for ever: the network controls the distribution.",
        r"Over the batch, $y$ has mean $\beta$ and standard deviation "
        r"$|\gamma| \sigma / \sqrt{\sigma^2 + \epsilon}$, nearly $|\gamma|$. With "
        r"$\gamma = \sqrt{\sigma^2 + \epsilon}$ and $\beta = \mu$ the layer gives back its input.",
        (2,),
    ),
    Claim(
        10,
        "Before the activation",
        "$y$ goes into the activation function.",
        "The lecture and the original paper normalize before the activation. In practice some "
        "networks normalize after it. The book measures both.",
        (2,),
    ),
    Claim(
        11,
        "Test batches would disagree",
        "At test time different batches would give different means and standard deviations, so the "
        "same example would get different results.",
        "The book shows one image beside different batch-mates, and measures how far its answer "
        "moves.",
        (4, 13),
    ),
    Claim(
        12,
        "Running statistics",
        "So use a running mean and a running standard deviation over the whole training set, fixed "
        "after training.",
        "In the frameworks they are an exponential moving average of batch statistics, which lags "
        "behind the weights. An exact pass over the training set is something else: "
        "recalibration. It is the variance that is averaged, not the standard deviation.",
        (4, 12),
    ),
    Claim(
        13,
        "The formula at test time",
        "At test time take the expectation of $z$ and the square root of its variance, with the "
        "same epsilon; then the same scale, shift and activation.",
        "All of these are fixed by then, so the layer is one multiplication and one addition per "
        "channel. It folds into the layer before it.",
        (4, 12),
    ),
    Claim(
        14,
        "What the frameworks keep for you",
        "TensorFlow and PyTorch keep these statistics for you. You create a layer, and when the "
        "model is in test mode the saved statistics are used.",
        "The two differ in names, axis, epsilon, momentum (opposite conventions), variance and "
        "modes. With these in mind you can carry a trained layer from one to the other.",
        (7, 11),
    ),
    Claim(
        15,
        "Three words for not training",
        'Test mode, inference, evaluation: all mean "not training".',
        "In code these are different switches. `model.eval()` switches the layer to its saved "
        "statistics. `torch.no_grad()`, `torch.inference_mode()` and `requires_grad_(False)` do "
        "not. In Keras both `training=False` and `trainable=False` do.",
        (11, 13),
    ),
    Claim(
        16,
        "The batch instead of the data set",
        "Batch normalization uses the statistics of the batch, not of the whole data set, which "
        "saves computation.",
        "You can count the cost per step of the two. The price is noise that depends on the batch "
        "size, and you can measure it.",
        (5,),
    ),
    Claim(
        17,
        "The second difference",
        "The learned shift and scale are the second difference from ordinary normalization.",
        "Ordinary normalization of the inputs is fixed before training. Scale and shift change "
        "during training, by gradient descent, and can undo the normalization.",
        (2,),
    ),
    Claim(
        18,
        "Stable predictions",
        "At test time the running statistics from training keep predictions stable.",
        "An example gets the same answer whatever stands beside it in the batch. That answer is "
        "stable; it is not always accurate.",
        (4, 12),
    ),
    Claim(
        19,
        "When to use it",
        "You need to know when to use it: in GANs, or in other models.",
        "The book puts it into GANs on real images and measures what it does there.",
        (17,),
    ),
    Claim(
        20,
        "What comes later",
        "More advanced normalization comes later.",
        "Layer, instance, group, conditional, virtual, spectral and adaptive instance "
        "normalization are each a small change to the same code.",
        (20,),
    ),
]


@dataclass(frozen=True)
class Place:
    """Where a chapter teaches a claim: the chapter's number and a link to the nearest heading."""

    chapter: int
    link: str


def places(path: Path) -> dict[str, Place]:
    """Find the places in a chapter that teach claims, by the tag of the claim."""
    notebook = read(path)
    all_headings = notebook_headings(notebook)
    title = next((heading.text for heading in all_headings if heading.level == 1), path.stem)
    found: dict[str, Place] = {}
    for index, cell in enumerate(notebook.cells):
        # A cell that has a heading itself teaches under that one.
        own = [heading for heading in all_headings if heading.cell == index][:1]
        above = own or [heading for heading in all_headings if heading.cell < index][-1:]
        link = f"[{title}](../chapters/{path.name})"
        if above and above[0].level > 1:
            link = f"[{title}: {above[0].text}](../chapters/{path.name}#{above[0].slug})"
        for tag in tags(cell):
            found.setdefault(tag, Place(chapter_number(path), link))
    return found


def page(root: Path) -> str:
    """Say all twenty claims, each with the places that teach it."""
    chapters = [places(path) for path in find_notebooks(root)]
    parts = [INTRODUCTION]
    for claim in CLAIMS:
        taught = [chapter[claim.tag] for chapter in chapters if claim.tag in chapter]
        written = [place.chapter for place in taught]
        missing = [str(number) for number in claim.chapters if number not in written]
        where = []
        if taught:
            where.append(f"Taught in {', '.join(place.link for place in taught)}.")
        if missing:
            noun = "chapter" if len(missing) == 1 else "chapters"
            where.append(f"Not written yet: {noun} {' and '.join(missing)}.")
        parts.append(
            f"## {claim.number}. {claim.title}\n\n"
            f"**The lecture says:** {claim.says}\n\n"
            f"**To be exact:** {claim.exact}\n\n"
            f"{' '.join(where)}\n"
        )
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Write the page, or say that it is out of date."""
    parser = argparse.ArgumentParser(description="Write back/lecture.md from the chapters.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the book")
    options = parser.parse_args(arguments)

    target = options.root / "back" / "lecture.md"
    try:
        text = page(options.root)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if not options.check:
        target.write_text(text, encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        sys.exit(f"{target} is out of date: run python tools/lecture.py")


if __name__ == "__main__":
    main()
