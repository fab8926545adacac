"""OrderedResampler: pooling at first, prefixes that never change, and what it can learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.resampler import FeatureReader, OrderedResampler, ResamplerConfig, files, plan
from vtok.resampler.learn import Features, answer_loss, prefixes, stacked
from vtok.resampler.starts import PICKED, TRAINED
from vtok.tokenizers import anchors

GRIDS = [(8, 8), (5, 9), (1, 7), (11, 2)]
SMALL = {"dim": 24, "width": 32, "blocks": 2, "tokens": 32, "head_dim": 16}


def made(trained: bool = False, **changes: object) -> OrderedResampler:
    torch.manual_seed(0)
    resampler = OrderedResampler(ResamplerConfig(**{**SMALL, **changes}))
    if trained:
        torch.nn.init.normal_(resampler.leave.weight, std=0.3)
        if resampler.config.scheme == "salient":
            torch.nn.init.normal_(resampler.saliency.out.weight)
        resampler.measure(3 * torch.randn(200, resampler.config.dim) + 1)
    return resampler.eval()


def tokens(grid: tuple[int, int], batch: int = 2, dim: int = 24) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(sum(grid)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scheme", anchors.SCHEMES)
def test_untrained_it_is_pooling(grid: tuple[int, int], scheme: str) -> None:
    x = tokens(grid)
    z = made(scheme=scheme)(x, grid)
    expected = anchors.pooling(anchors.boxes(32, scheme), *grid) @ x
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_untrained_it_is_the_least_alike(grid: tuple[int, int]) -> None:
    x = tokens(grid)
    resampler = made(scheme="farthest")
    first = resampler.starts(x, grid, 32)
    count = min(32, x.shape[1])
    assert first.picks is not None and first.picks.shape == (2, count)
    assert torch.equal(resampler(x, grid), x.gather(1, first.picks[..., None].expand(-1, -1, 24)))
    unit = torch.nn.functional.normalize(x, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    for row, picks in enumerate(first.picks.tolist()):
        assert len(set(picks)) == count
        for k in range(1, count):
            nearest = distance[row, :, picks[:k]].amin(1)
            rest = [cell for cell in range(x.shape[1]) if cell not in picks[:k]]
            assert nearest[picks[k]] >= nearest[rest].max() - 1e-5


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scheme", TRAINED)
def test_the_first_k_of_many_are_a_run_with_k(grid: tuple[int, int], scheme: str) -> None:
    resampler, x = made(trained=True, scheme=scheme), tokens(grid)
    whole = resampler(x, grid)
    assert (whole - resampler.starts(x, grid, 32).tokens).abs().max() > 0.1
    for k in (1, 2, 3, 7, 16, 31):
        torch.testing.assert_close(resampler(x, grid, k), whole[:, :k], atol=1e-5, rtol=0)


def test_what_is_picked_does_not_depend_on_what_was_measured() -> None:
    resampler, x = made(scheme="farthest"), tokens((6, 6)) + 1
    before = resampler.starts(x, (6, 6), 8).picks
    resampler.measure(3 * x + 5)
    assert before is not None and torch.equal(resampler.starts(x, (6, 6), 8).picks, before)


@pytest.mark.parametrize("scheme", TRAINED)
def test_a_picture_does_not_depend_on_its_batch(scheme: str) -> None:
    resampler, x = made(trained=True, scheme=scheme), tokens((6, 5), batch=3)
    together = resampler(x, (6, 5))
    for row in range(3):
        torch.testing.assert_close(resampler(x[row : row + 1], (6, 5))[0], together[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", TRAINED)
def test_masked_cells_are_not_there(scheme: str) -> None:
    resampler, x = made(trained=True, scheme=scheme), tokens((4, 6))
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 12:] = False
    z = resampler(x, (4, 6), 12, mask=mask)
    other = torch.where(mask[..., None], x, 100.0)
    torch.testing.assert_close(resampler(other, (4, 6), 12, mask=mask), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(z[0], resampler(x, (4, 6), 12)[0], atol=1e-5, rtol=0)
    if scheme in PICKED:
        with pytest.raises(VtokError, match="13 tokens cannot be picked from 12 cells"):
            resampler(x, (4, 6), 13, mask=mask)


@pytest.mark.grad
@pytest.mark.parametrize("k", [1, 2, 9, 32])
@pytest.mark.parametrize("scheme", TRAINED)
def test_gradients_reach_every_part_at_every_k(k: int, scheme: str) -> None:
    resampler = made(trained=True, scheme=scheme).train()
    x = tokens((6, 6)).requires_grad_()
    resampler(x, (6, 6), k).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert (resampler.registers.grad.abs().sum(1) > 0).tolist() == [True] * k + [False] * (32 - k)
    for name, weight in resampler.named_parameters():
        if name.startswith("saliency."):  # which tokens are picked has no gradient
            continue
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_a_plan_stands_for_every_cell() -> None:
    for scheme in anchors.SCHEMES:
        found = plan(20, (6, 7), scheme)
        assert torch.equal(found.owner[found.places], torch.arange(20))
        assert found.owner.min() >= 0
        shown = found.weights[found.owner, torch.arange(42)]
        standing = torch.zeros(42).index_fill(0, found.places, 1).bool()
        assert (shown[~standing] > 0).all()


@pytest.mark.parametrize("scheme", TRAINED)
def test_saved_and_loaded_bit_by_bit(tmp_path: Path, scheme: str) -> None:
    resampler = made(trained=True, halting=True, family="llava", fingerprint=(0.5, -0.25), scheme=scheme)
    files.save(resampler, tmp_path / "own")
    again = files.load(tmp_path / "own")
    assert again.config == resampler.config
    assert not any(p.requires_grad for p in again.parameters())
    x = tokens((5, 9))
    assert torch.equal(again(x, (5, 9)), resampler(x, (5, 9)))
    small = files.load(files.save(resampler, tmp_path / "small", torch.bfloat16))
    assert torch.equal(small.mean, resampler.mean)
    torch.testing.assert_close(small(x, (5, 9)), resampler(x, (5, 9)), atol=0.2, rtol=0)


def test_names_are_found_where_a_package_ships_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "mine"

        @staticmethod
        def load():
            return lambda name: tmp_path / name

    monkeypatch.setattr(files, "entry_points", lambda group: [Entry] if group == "vtok.resamplers" else [])
    with pytest.raises(VtokError, match=r"came without the resampler mine.*leave weights out"):
        files.load("mine")
    files.save(made(), tmp_path / "mine")
    assert files.load("mine").config == made().config
    with pytest.raises(VtokError, match=r"no resampler 'other'.*known names are mine.*distill"):
        files.load("other")


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(VtokError, match="holds no resampler"):
        files.load(tmp_path)
    folder = files.save(made(), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    for fields, match in (
        ({**config, "colour": 1}, "knows no colour"),
        ({**config, "width": 33}, "no multiple of head_dim"),
        ({**config, "blocks": 3}, r"model.safetensors cannot be loaded"),
        ([], "no resampler's configuration"),
    ):
        (folder / "config.json").write_text(json.dumps(fields))
        with pytest.raises(VtokError, match=match):
            files.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(VtokError, match="cannot be read"):
        files.load(folder)
    files.save(made(), folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(VtokError, match="cannot be loaded"):
        files.load(folder)
    with pytest.raises(VtokError, match="is a file"):
        files.save(made(), folder / "config.json")


@pytest.mark.parametrize("k", [0, 33, -1, 2.0, True])
def test_wrong_k(k: object) -> None:
    with pytest.raises(VtokError, match=r"not to be had: this resampler gives 1 to 32"):
        made()(tokens((4, 4)), (4, 4), k)


def test_wrong_tokens() -> None:
    with pytest.raises(VtokError, match=r"do not fill a grid of 4 x 5"):
        made()(tokens((4, 4)), (4, 5))
    with pytest.raises(VtokError, match=r"24 channels, and these have 8.*another model"):
        made()(tokens((4, 4), dim=8), (4, 4))
    with pytest.raises(VtokError, match="no halting head"):
        made().enough(torch.zeros(1, 2, 32), 0.5)


def test_prefixes_grow_downwards() -> None:
    torch.manual_seed(0)
    early = [prefixes(64, 0.0) for _ in range(200)]
    assert {long for long, _ in early} == {64} and min(k for _, k in early) == 8
    assert {long for long, _ in (prefixes(64, whole=0.5) for _ in range(50))} == {16, 64}
    late = [prefixes(64, 1.0)[1] for _ in range(600)]
    assert min(late) == 1 and max(late) >= 60
    assert 0.3 < sum(k <= 8 for k in late) / 600 < 0.7  # log-uniform: half below the root


@pytest.mark.grad
@pytest.mark.parametrize("scheme", ["haar", "farthest"])
def test_features_are_learnt_and_more_tokens_show_more(scheme: str) -> None:
    """A toy whose tokens lie in a plane of few directions: after a while every doubling explains more."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    basis = torch.randn(4, 24, generator=generator)
    coarse = torch.randn(32, 4, 4, 4, generator=generator).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = coarse.flatten(1, 2) @ basis
    config = ResamplerConfig(**{**SMALL, "blocks": 1, "scheme": scheme})
    learned = Features(OrderedResampler(config), FeatureReader(config, blocks=1))
    learned.resampler.measure(x)
    learned.reader.measure(learned.resampler)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=3e-3)
    first, steps = None, 120
    for step in range(steps):
        rows = torch.randperm(32)[:8]
        loss, numbers = learned.loss([(x[row], (8, 8)) for row in rows], step / steps)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    assert numbers.keys() == {"long", "some"}
    with torch.no_grad():
        read = learned.resampler.read(x, (8, 8))
        shares = [learned.reader.loss(read, k, x, (8, 8))[1].mean().item() for k in (1, 4, 16, 32)]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.2


def test_answers_that_agree_cost_nothing_but_the_truth() -> None:
    teacher = torch.randn(5, 11)
    target = teacher.argmax(-1)
    loss, numbers = answer_loss(teacher.clone(), teacher, target, weight=1.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert numbers == {"kl": pytest.approx(0, abs=1e-6), "right": 1.0}
    student = torch.randn(5, 11)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    by_hand = 4 * (p * (p / q).log()).sum(-1).mean()
    truth = torch.nn.functional.cross_entropy(student, target)
    loss, _ = answer_loss(student, teacher, target, temperature=2.0, weight=0.7)
    assert loss.item() == pytest.approx(0.7 * by_hand.item() + 0.3 * truth.item(), rel=1e-5)
    best = teacher.topk(11)
    some, _ = answer_loss(student, (best.values, best.indices), target, temperature=2.0, weight=0.7)
    assert some.item() == pytest.approx(loss.item(), rel=1e-5)


def test_pictures_of_one_grid_go_together() -> None:
    pictures = [(torch.zeros(6, 2), (2, 3)), (torch.ones(4, 2), (2, 2)), (torch.ones(6, 2), (2, 3))]
    assert [(grid, len(x)) for grid, x in stacked(pictures)] == [((2, 3), 2), ((2, 2), 1)]
