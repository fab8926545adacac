"""Statistics of sequences whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtok.errors import VtokError
from vtok.tokenizers.stats import ABSENT, entropy, huffman, padded, statistics, zipf


def sample(exponent: float, images: int, length: int = 32, codes: int = 500) -> torch.Tensor:
    """Independent draws from Zipf's law."""
    law = torch.arange(1, codes + 1, dtype=torch.float64) ** -exponent
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(law / law.sum(), images * length, True, generator=generator).view(images, length)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_the_exponent_of_a_zipf_sample_is_found(exponent: float) -> None:
    fit = statistics(sample(exponent, 600), 500).zipf[0]
    assert fit.exponent == pytest.approx(exponent, abs=0.04)
    assert fit.distance < 0.03 and fit.error < 0.02


def test_the_exponent_is_where_the_likelihood_is_highest() -> None:
    counts = torch.tensor([700, 200, 80, 15, 5])
    found, error, _ = zipf(counts)
    logs = torch.arange(1, 6, dtype=torch.float64).log()

    def likelihood(exponent: float) -> float:
        return float((counts * torch.log_softmax(-exponent * logs, 0)).sum())

    assert likelihood(found) > max(likelihood(found - 0.01), likelihood(found + 0.01))
    curvature = (2 * likelihood(found) - likelihood(found - 1e-3) - likelihood(found + 1e-3)) / 1e-6
    assert error == pytest.approx(curvature**-0.5, rel=1e-3)


def test_too_few_repeats_have_no_exponent() -> None:
    found = statistics(torch.arange(400).view(20, 20))
    assert [fit.exponent for fit in found.zipf] == [None] * 4
    assert statistics(torch.zeros(40, 1, dtype=torch.long)).zipf[0].exponent is None


def test_entropy_and_huffman_of_known_distributions() -> None:
    counts = torch.tensor([4000, 2000, 1000, 1000])
    assert entropy(counts) == pytest.approx(1.75, abs=1e-3)
    assert huffman(counts) == 1.75
    assert huffman(torch.tensor([7])) == 0


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
def test_huffman_is_within_a_bit_of_the_entropy(counts: list[int]) -> None:
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    plain = float(-(share * share.log2()).sum())
    assert plain - 1e-9 <= huffman(torch.tensor(counts)) < plain + 1


def test_positions_tell_dead_ones_and_the_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 24, (4000, 6), generator=generator)
    tokens[:, 1] = 5
    tokens[:, 4:] = 7
    found = statistics(tokens, 24, levels=(2, 3, 4))
    assert [p.dead for p in found.positions] == [False, True, False, False, True, True]
    assert found.dead_tail == 2
    first, dead = found.positions[0], found.positions[1]
    assert first.entropy == pytest.approx(math.log2(24), abs=0.01)
    assert first.channels == pytest.approx(math.log2(24), abs=0.01)
    assert first.ceiling == math.log2(24) and first.distinct == 24
    assert dead.distinct == 1 and dead.top == 1 and dead.entropy == 0 and dead.channels == 0


def test_channels_of_a_code_are_its_digits() -> None:
    low = torch.arange(1000) % 2
    found = statistics((low + 2 * 1).view(-1, 1), 8, levels=(2, 4))
    assert found.positions[0].channels == pytest.approx(1.0, abs=0.01)


def test_innovation_counts_codes_when_they_first_occur() -> None:
    tokens = torch.tensor([[0, 1], [0, 2], [3, 3], [0, 0], [4, 4]])
    assert statistics(tokens).innovation == ((1, 0.4), (2, 0.6), (4, 0.8), (5, 1.0))


def test_what_depends_on_its_image_compresses_better_than_shuffled() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 256, (800, 1), generator=generator)
    bound = statistics((start + torch.arange(16)) % 256, 256).compression
    assert bound.lzma < 0.5 * bound.shuffled
    free = statistics(torch.randint(0, 256, (800, 16), generator=generator), 256).compression
    assert free.lzma == pytest.approx(free.shuffled, rel=0.01)
    assert free.fixed == 8 and free.entropy == pytest.approx(8, abs=0.05) and 8 <= free.gzip < 8.2
    assert free.saved == pytest.approx(0, abs=0.01)


def test_sequences_of_different_lengths() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([1]), torch.tensor([4, 4])]
    assert padded(rows).tolist() == [[1, 2, 3], [1, ABSENT, ABSENT], [4, 4, ABSENT]]
    found = statistics(rows)
    assert (found.images, found.tokens, found.codes, found.used) == (3, 6, 5, 4)
    assert [p.images for p in found.positions] == [3, 2, 1]
    assert [fit.distinct for fit in found.zipf] == [4, 3, 1]


def test_statistics_are_the_same_again() -> None:
    tokens = sample(1.0, 50, 8, 100)
    assert statistics(tokens, 100) == statistics(tokens, 100)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([], {}, "one image at least"),
        (torch.zeros(3, 2, 2, dtype=torch.long), {}, "a table"),
        (torch.zeros(3, 2), {}, "continuous"),
        ([torch.zeros(0, dtype=torch.long)], {}, "no tokens"),
        (torch.tensor([[1, 9]]), {"codes": 8}, "from 0 to 7"),
        (torch.tensor([[1, 7]]), {"codes": 8, "levels": (2, 2)}, "make 4 codes, not 8"),
    ],
)
def test_what_cannot_be_counted_is_refused(tokens: object, options: dict, words: str) -> None:
    with pytest.raises(VtokError, match=words):
        statistics(tokens, **options)  # type: ignore[arg-type]
