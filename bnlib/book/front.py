"""The live figures of pages that are not notebooks: (still picture, HTML) by name."""

from matplotlib.figure import Figure

from bnlib.book import figures, live, network, style
from bnlib.data import digits
from bnlib.scratch import functional


def normalize() -> tuple[Figure, str]:
    """Return the figure of chapter 1: 32 values of one node, before and after normalizing."""
    style.use()
    z = network.pre_activations(digits("train")[0][:1024])
    z_hat = functional.normalize(z[:32], *functional.moments(z[:32]))
    names = {"the last node": 9, "the fourth node": 3, "the sixth node": 5}
    nodes = [{"name": name, "z": z[:, i].round(5).tolist()} for name, i in names.items()]
    start = {"node": 0, "batch_size": 32, "eps": 1e-5, "draw": 0}
    picture = figures.normalization(z[:32, 9], z_hat[:, 9])
    return picture, live.fragment("normalize", {"nodes": nodes}, **start)
