"""What a resampler learns from: features that a reader finds in its prefixes, and a model's own answers.

Every step looks at two prefixes, a long one and a random k ("sandwich", universally slimmable networks,
arXiv 1903.05134). The random one's range grows downwards to 1 over the first half (EPIC, arXiv 2510.00515).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.resampler.reader import FeatureReader
from vtok.resampler.resampler import OrderedResampler
from vtok.resampler.saliency import energy, saliency_loss

#: visual tokens (n, D) of one picture with its grid (rows, columns)
Picture = tuple[Tensor, tuple[int, int]]


def prefixes(most: int, progress: float = 1.0, whole: float = 1.0) -> tuple[int, int]:
    """A long prefix and a random one, log-uniform in 1..K. Draws from torch's global generator.

    Args:
        most: K.
        progress: of the training, in [0, 1]: the random one's lower end falls from sqrt(K) to 1 over the first half.
        whole: how often the long one is K; else it is a quarter of it, which costs a language model a quarter.
    """
    least = most ** (0.5 * (1 - min(1.0, 2 * progress)))
    drawn = math.exp(torch.rand(()).item() * math.log((most + 1) / least)) * least
    long = most if torch.rand(()).item() < whole else max(1, most // 4)
    return long, max(1, min(most, int(drawn)))


class Features(nn.Module):
    """Stage of features: a reader must find a picture's features in every prefix. No language model runs.

    Args:
        resampler: what is trained.
        reader: trained along, and thrown away.
    """

    def __init__(self, resampler: OrderedResampler, reader: FeatureReader) -> None:
        super().__init__()
        self.resampler, self.reader = resampler, reader

    def loss(self, pictures: Sequence[Picture], progress: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """Mean over pictures and prefixes, and the share of the features that each prefix explains, for the log."""
        config, count = self.resampler.config, 0
        explained: dict[str, list[float]] = defaultdict(list)
        chosen = prefixes(config.tokens, progress)
        whole: Tensor = torch.zeros(())
        for grid, x in stacked(pictures):
            read = self.resampler.read(x, grid, max(chosen))
            most = read.tokens.shape[1]
            for name, wanted in zip(("long", "some"), chosen, strict=True):
                loss, share = self.reader.loss(read, min(wanted, most), x, grid)
                explained[name] += share.tolist()
                whole = whole.to(x.device) + loss * len(x) / 2
            count += len(x)
        return whole / count, {name: sum(own) / len(own) for name, own in explained.items()}


def stacked(pictures: Sequence[Picture]) -> list[tuple[tuple[int, int], Tensor]]:
    """Pictures of one grid together: (grid, (B, n, D))."""
    found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for x, grid in pictures:
        found[grid].append(x)
    return [(grid, torch.stack(own)) for grid, own in found.items()]


def salience(
    resampler: OrderedResampler, pictures: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Stage of saliency, where tokens are picked by what they matter: the loss of the head that tells.

    Args:
        resampler: of the scheme ``"salient"``.
        pictures: visual tokens (n, D) of each.
        gradients: (n, D) of the log-probability of what the model answers to one question; NaN where not known.
    """
    found = [energy(own, resampler.spread) for own in gradients]
    logits = [resampler.saliency(resampler.standard(x)) for x in pictures]
    loss = saliency_loss(logits, found)
    return loss, {"perplexity": math.exp(min(20.0, loss.item()))}


def answer_loss(
    student: Tensor,
    teacher: Tensor | tuple[Tensor, Tensor],
    target: Tensor,
    temperature: float = 1.0,
    weight: float = 0.7,
) -> tuple[Tensor, dict[str, float]]:
    """Stage of answers: ``weight`` T^2 KL(teacher || student) + (1 - weight) cross-entropy, over answer tokens.

    Args:
        student: (A, V) logits with the resampler's tokens.
        teacher: (A, V) logits of the same model with all tokens; or a pair of (A, C) logits and (A, C) token ids, its
            best ones.
        target: (A,) the right tokens.
        temperature: T.
        weight: of the divergence.
    """
    student = student.float()
    values, some = (teacher[0], student.gather(1, teacher[1])) if isinstance(teacher, tuple) else (teacher, student)
    wanted = (values.float() / temperature).log_softmax(-1)
    found = (some / temperature).log_softmax(-1)
    divergence = F.kl_div(found, wanted, log_target=True, reduction="batchmean") * temperature**2
    truth = F.cross_entropy(student, target)
    loss = weight * divergence + (1 - weight) * truth
    right = (student.argmax(-1) == target).float().mean().item()
    return loss, {"kl": divergence.item(), "right": right}
