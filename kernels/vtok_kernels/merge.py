"""Merge plans: where each token goes, and what that does to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import check_shape, check_tokens, score_dtype
from .backend import operator
from .compact import gather_tokens


def _slots(dst: Tensor, n_out: int) -> Tensor:
    """dst with dropped tokens in a slot of their own, n_out, which is cut off or holds zeros."""
    return torch.where(dst < 0, n_out, dst)


def _flat(x: Tensor, dst: Tensor) -> Tensor:
    """x (B, N, ...) as (B, N, C)."""
    if x.shape[:2] != dst.shape:
        raise ValueError(f"x {tuple(x.shape)} does not fit a plan of {tuple(dst.shape)} tokens: pass (B, N, ...).")
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)


@operator
def merge_sum(x: Tensor, dst: Tensor, n_out: int) -> Tensor:
    """Sum of x (B, N, ...) over the tokens of each output slot: (B, n_out, ...). Half precision is summed in fp32."""
    flat = _flat(x, dst)
    if x.is_floating_point():
        flat = flat.to(score_dtype(x))
    batch, n, channels = flat.shape
    slots = _slots(dst, n_out)
    if channels == 1:
        summed = flat.new_zeros(batch, n_out + 1, 1).scatter_add(1, slots.unsqueeze(-1), flat)
    else:
        # Whole rows are added: scatter_add, which reads an index an element, takes 5 to 11 times as long on a CPU.
        own = (slots + (n_out + 1) * torch.arange(batch, device=dst.device)[:, None]).flatten()
        summed = flat.new_zeros(batch * (n_out + 1), channels).index_add(0, own, flat.reshape(batch * n, channels))
        summed = summed.reshape(batch, n_out + 1, channels)
    return summed[:, :n_out].reshape(x.shape[0], n_out, *x.shape[2:]).to(x.dtype)


@operator
def merge_mean(x: Tensor, dst: Tensor, n_out: int, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of x (B, N, ...) over the tokens of each output slot; weights (B, N) or (B, N, 1)."""
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, which has no mean: convert it to a floating type, or use sum or amax.")
    flat, slots = _flat(x, dst).to(score_dtype(x)), _slots(dst, n_out)

    def share(weight: Tensor) -> tuple[Tensor, Tensor]:
        total = merge_sum(weight, slots, n_out + 1).gather(1, slots)
        return weight / total.where(total > 0, 1.0), total

    shares, _ = share(flat.new_ones(dst.shape))
    if weights is not None:
        check_shape("weights", weights, tuple(dst.shape), (*dst.shape, 1))
        weighted, total = share(weights.reshape(dst.shape).to(flat.dtype))
        # Where all weights of a slot vanish (keys that nobody attends) the mean is the plain one, not 0 / 0.
        shares = torch.where(total > 0, weighted, shares)
    # Shares are divided out before the sum, so that tiny weights neither vanish nor overflow in the products.
    merged = merge_sum(shares.unsqueeze(-1) * flat, dst, n_out)
    return merged.reshape(x.shape[0], n_out, *x.shape[2:]).to(x.dtype)


Weights = Tensor | Sequence[Tensor | None] | None


@operator
def merge_tokens(
    dst: Tensor, n_out: int, means: Sequence[Tensor], sums: Sequence[Tensor] = (), weights: Weights = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Pour several tensors (B, N, ...) into the same slots at once: features and places averaged, sizes summed.

    Parameters
    ----------
    dst : (B, N) long
        Output slot of each token; -1 = dropped.
    n_out : int
        Number of slots.
    means : of (B, N, ...)
        As of `merge_mean`.
    sums : of (B, N, ...)
        As of `merge_sum`.
    weights : (B, N) or (B, N, 1), or a sequence, optional
        Of the means: one for all, or one (or None) for each.

    Returns
    -------
    (list, list) of (B, n_out, ...)
        The means and the sums. Differentiable.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    each = weights_of(means, weights)
    averaged = [merge_mean(x, dst, n_out, weight) for x, weight in zip(means, each, strict=True)]
    return averaged, [merge_sum(x, dst, n_out) for x in sums]


def weights_of(means: Sequence[Tensor], weights: Weights) -> list[Tensor | None]:
    """One entry for each of `means`."""
    if weights is None or isinstance(weights, Tensor):
        return [weights] * len(means)
    if len(weights) != len(means):
        raise ValueError(f"There are {len(weights)} weights for {len(means)} means: pass one for all or one for each.")
    return list(weights)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """For each token the output slot it pours into; prune is a plan that drops.

    One index vector replaces the source matrices of the papers' code: it sums, averages, takes maxima, undoes and
    composes. Every slot in [0, n_out) must have a token.

    Attributes
    ----------
    dst : (B, N) long
        Output slot of each token; -1 = dropped.
    n_out : int
        Number of output slots.
    representative : (B, n_out) long, optional
        The token whose place (position id, grid cell) the slot takes.
    """

    dst: Tensor
    n_out: int
    representative: Tensor | None = None

    def __post_init__(self) -> None:
        check_tokens("dst", self.dst, 2, "(B, N)")
        if self.dst.dtype != torch.long:
            raise ValueError(f"dst is {self.dst.dtype}, but slots are indices: pass a long tensor.")
        if self.representative is not None:
            check_shape("representative", self.representative, (self.dst.shape[0], self.n_out))

    @classmethod
    def identity(cls, batch: int, n: int, device: torch.device | str | None = None) -> "MergePlan":
        """The plan that leaves n tokens as they are."""
        itself = torch.arange(n, device=device).expand(batch, n)
        return cls(itself, n, itself)

    @classmethod
    def from_kept(cls, indices: Tensor, n: int) -> "MergePlan":
        """The plan that keeps the distinct `indices` (B, K) of n tokens, in their order, and drops the rest."""
        check_tokens("indices", indices, 2, "(B, K)")
        batch, k = indices.shape
        slots = torch.arange(k, device=indices.device).expand(batch, k)
        dropped = torch.full((batch, n), -1, dtype=torch.long, device=indices.device)
        return cls(dropped.scatter(1, indices, slots), k, indices)

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of x (B, N, ...) in each slot, weighted by `weights` (B, N) or (B, N, 1): (B, n_out, ...).

        Dropped tokens contribute nothing. A slot whose weights are all zero gets the plain mean. Differentiable.
        """
        return merge_mean(x, self.dst, self.n_out, weights)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x (B, N, ...) in each slot, of sizes for example: (B, n_out, ...). Differentiable."""
        return merge_sum(x, self.dst, self.n_out)

    def pour(
        self, means: Sequence[Tensor], sums: Sequence[Tensor] = (), weights: Weights = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`merge` of `means` and `sum` of `sums` at once; weights for all means, or one for each. Differentiable."""
        return merge_tokens(self.dst, self.n_out, means, sums, weights)

    def amax(self, x: Tensor) -> Tensor:
        """Maximum of x (B, N, ...) in each slot: (B, n_out, ...). Differentiable."""
        flat = _flat(x, self.dst)
        slots = _slots(self.dst, self.n_out).unsqueeze(-1).expand_as(flat)
        start = flat.new_zeros(flat.shape[0], self.n_out + 1, flat.shape[2])
        highest = start.scatter_reduce(1, slots, flat, "amax", include_self=False)
        return highest[:, : self.n_out].reshape(x.shape[0], self.n_out, *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every token its slot's row of y (B, n_out, ...): (B, N, ...). Dropped tokens get 0. Differentiable."""
        if y.shape[:2] != (self.dst.shape[0], self.n_out):
            raise ValueError(f"y {tuple(y.shape)} has not the plan's {self.n_out} slots: pass what merge returned.")
        padded = torch.cat([y, y.new_zeros(y.shape[0], 1, *y.shape[2:])], 1)
        return gather_tokens(padded, _slots(self.dst, self.n_out))

    def counts(self) -> Tensor:
        """Number of tokens in each slot: (B, n_out) long."""
        return self.sum(torch.ones_like(self.dst))

    def then(self, other: "MergePlan") -> "MergePlan":
        """This plan followed by `other`, which acts on this plan's output."""
        if other.dst.shape != (self.dst.shape[0], self.n_out):
            raise ValueError(
                f"The second plan takes {tuple(other.dst.shape)} tokens, but the first one gives "
                f"{(self.dst.shape[0], self.n_out)}: make it from the first one's output."
            )
        dropped = other.dst.new_full((self.dst.shape[0], 1), -1)
        dst = torch.cat([other.dst, dropped], 1).gather(1, _slots(self.dst, self.n_out))
        if self.representative is None or other.representative is None:
            return MergePlan(dst, other.n_out)
        return MergePlan(dst, other.n_out, self.representative.gather(1, other.representative))

    def groups(self) -> list[list[list[int]]]:
        """Tokens of each slot of each item, ascending, as host lists for reports. Waits for the device."""
        groups: list[list[list[int]]] = []
        for row in self.dst.tolist():
            slots: list[list[int]] = [[] for _ in range(self.n_out)]
            for token, slot in enumerate(row):
                if slot >= 0:
                    slots[slot].append(token)
            groups.append(slots)
        return groups


def merge_attention(plan: MergePlan, attn: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fuse an attention map by a plan: columns (keys) summed, rows (queries) averaged (MCTF, arXiv 2403.10030).

    Parameters
    ----------
    plan : MergePlan
        Of N tokens.
    attn : (B, H, N, N)
        Attention, rows = queries.
    weights : (B, N) or (B, N, 1), optional
        Weights of the row average.

    Returns
    -------
    (B, H, n_out, n_out)
        Row-stochastic where attn is and the plan drops nothing. Differentiable.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    check_tokens("attn", attn, 4, "(B, H, N, N)")
    n = plan.dst.shape[1]
    check_shape("attn", attn, (plan.dst.shape[0], attn.shape[1], n, n))
    rows = plan.merge(attn.transpose(1, 2), weights)  # (B, n_out, H, N)
    return plan.sum(rows.permute(0, 3, 2, 1)).permute(0, 2, 3, 1)


def reuse_attention(
    plan: MergePlan,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    *,
    scale: float,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend to merged values by the attention of the tokens as they were, fused by the plan (MCTF).

    ``merge_attention(plan, A, weights) @ values`` with ``A = softmax(scale * q k^T + bias)``, from the right: values go
    back to all tokens, attention runs on these, and its rows are averaged. So no map is held, and attention may be any
    fused kernel.

    Parameters
    ----------
    plan : MergePlan
        Of N tokens, none dropped.
    q, k : (B, H, N, d)
        Projections of the tokens before the merge.
    values : (B, H, n_out, d)
        Of the merged tokens.
    scale : float
        Factor on q.k.
    weights : (B, N) or (B, N, 1), optional
        Weights of the row average.
    bias : broadcastable to (B, H, N, N), optional
        Added to the logits.

    Returns
    -------
    (B, H, n_out, d)
        Differentiable.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    check_tokens("q", q, 4, "(B, H, N, d)")
    batch, heads, n, width = q.shape
    check_shape("plan", plan.dst, (batch, n))
    check_shape("k", k, (batch, heads, n, width))
    check_shape("values", values, (batch, heads, plan.n_out, values.shape[-1]))
    spread = plan.unmerge(values.transpose(1, 2)).transpose(1, 2)
    mask = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, spread.to(q.dtype), attn_mask=mask, scale=scale)
    return plan.merge(out.transpose(1, 2), weights).transpose(1, 2)
