"""Matrices that lie whole on one rank each, their owner, and that the other ranks borrow while they compute with them.

A block borrows its matrices just before its forward pass and again before its backward pass, while the block before it is computed. The
sum of the gradients goes to the owner alone. So an owner can update its matrices at any time, and sends nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.ranks import Ranks


class Sums:
    """Sums of gradients over the ranks, on their way to the owners. Those of two blocks are under way at most."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.older: list[tuple[Loan, Tensor, Any]] = []
        self.newer: list[tuple[Loan, Tensor, Any]] = []
        self.ends_with_pass = False

    def begin(self, loan: Loan, grad: Tensor) -> None:
        """Send this rank's gradient (m, n), any float dtype. Divided before it is summed, as DDP does."""
        if not self.ends_with_pass:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
            self.ends_with_pass = True
        share = torch.mul(grad.float(), 1.0 / self.ranks.world).contiguous()
        self.newer.append((loan, share, dist.reduce(share, dst=loan.owner, async_op=True)))

    def next_block(self) -> None:
        """Take over the sums of the block before the last."""
        for loan, share, work in self.older:
            work.wait()
            if loan.mine:
                p = loan.param
                p.grad = share if p.grad is None else p.grad.add_(share)
        self.older, self.newer = self.newer, []

    def finish(self) -> None:
        """Take over all sums; at the end of a backward pass."""
        self.next_block()
        self.next_block()
        self.ends_with_pass = False


class Loan:
    """A matrix that one rank owns, and what is lent of it.

    Elsewhere than on its owner, `param` is a view of a single NaN in the shape of the matrix: it takes no memory, and a wrong use is
    noticed. `whole` is the matrix (m, n) that modules use during a forward and a backward pass, in the dtype of the products. Between
    the two, and after them, its storage is empty.
    """

    def __init__(self, param: nn.Parameter, owner: int, users: list[tuple[nn.Module, str]], sums: Sums) -> None:
        self.param, self.owner, self.users, self.sums = param, owner, users, sums
        self.mine = owner == sums.ranks.rank
        self.work: Any = None
        self.take_back()
        self.whole = self.alias = param.data  # of one storage; autograd does not see what is written to the alias

    def take_back(self) -> None:
        """Keep the matrix on its owner only."""
        if not self.mine:
            self.param.data = torch.full((), torch.nan, device=self.param.device).expand(self.param.shape)

    def spread(self) -> None:
        """Put the matrix into `param` on every rank, until `take_back`."""
        if not self.mine:
            self.param.data = torch.empty(self.param.shape, device=self.param.device)
        dist.broadcast(self.param.data, src=self.owner)

    @property
    def is_weight(self) -> bool:
        """Whether `whole` is the weight itself, whose storage stays."""
        return self.mine and self.alias.dtype == self.param.dtype

    def begin(self, dtype: torch.dtype | None = None) -> None:
        """Begin to send `whole` from the owner, unless that is done. A dtype: anew, for a forward pass; None: again, for its backward pass."""
        if self.work is not None:
            return
        if dtype is not None:
            own = self.mine and dtype == self.param.dtype
            self.whole = (
                self.param.data if own else torch.empty(self.param.shape, dtype=dtype, device=self.param.device)
            )
            self.alias = self.whole.data
        if not self.is_weight:
            self.alias.untyped_storage().resize_(self.alias.numel() * self.alias.element_size())
            if self.mine:
                self.alias.copy_(self.param.data)
        self.work = dist.broadcast(self.alias, src=self.owner, async_op=True)

    def release(self) -> None:
        """Empty the storage of `whole`."""
        self.work = None
        if not self.is_weight:
            self.alias.untyped_storage().resize_(0)


class _Borrowed(torch.autograd.Function):
    """The whole matrix (m, n) of a loan, as a function of its parameter; its gradient goes to the owner."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, loan: Loan) -> Tensor:
        ctx.loan = loan
        return loan.whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        loan: Loan = ctx.loan
        loan.sums.begin(loan, grad)
        loan.release()
        return None, None


class Borrower:
    """The loans of one module, in its forward and backward passes. `before` and `after` are computed next to it; None at an end."""

    def __init__(self, module: nn.Module, loans: list[Loan], sums: Sums) -> None:
        self.loans, self.sums = loans, sums
        self.before: Borrower | None = None
        self.after: Borrower | None = None
        self.active = True
        module.register_forward_pre_hook(self._forward_begins)
        module.register_forward_hook(self._forward_ends)

    def _begin(self, beside: Borrower | None, dtype: torch.dtype | None) -> None:
        """Begin to send the matrices of this module and of the next one; wait for those of this module."""
        for loan in (*self.loans, *(beside.loans if beside else ())):
            loan.begin(dtype)
        for loan in self.loans:
            loan.work.wait()

    def _forward_begins(self, module: nn.Module, inputs: Any) -> None:
        if not self.active:
            return
        device = self.sums.ranks.device.type
        self._begin(
            self.after, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        )
        for loan in self.loans:
            borrowed = _Borrowed.apply(loan.param, loan)
            for user, name in loan.users:
                user._parameters[name] = borrowed  # not a leaf, so it could not be assigned as an attribute

    def _forward_ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.active:
            return
        for loan in self.loans:
            for user, name in loan.users:
                user._parameters[name] = loan.param
            loan.release()
        for t in output if isinstance(output, tuple) else (output,):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(self._backward_begins)

    def _backward_begins(self, grad: Tensor) -> None:
        self._begin(self.before, None)
        self.sums.next_block()


class Lender:
    """All loans of a model.

    Args:
        owners: the rank of each parameter that one rank owns.
        blocks: modules that are computed one after the other; parameters outside of all are lent for the whole forward pass.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], owners: Mapping[Tensor, int], ranks: Ranks
    ) -> None:
        sums, left = Sums(ranks), dict(owners)
        self.borrowers = [
            borrower for block in blocks if (borrower := _borrower(block, block.modules(), left, sums)) is not None
        ]
        for before, after in zip(self.borrowers, self.borrowers[1:]):
            before.after, after.before = after, before
        if (outside := _borrower(model, model.modules(), left, sums)) is not None:
            self.borrowers.append(outside)
        self.loans = [loan for borrower in self.borrowers for loan in borrower.loans]

    @contextmanager
    def all_spread(self) -> Iterator[None]:
        """A context in which every rank has all matrices in their parameters, and nothing is lent."""
        for loan in self.loans:
            loan.spread()
        for borrower in self.borrowers:
            borrower.active = False
        try:
            yield
        finally:
            for loan in self.loans:
                loan.take_back()
            for borrower in self.borrowers:
                borrower.active = True


def _borrower(module: nn.Module, parts: Iterable[nn.Module], left: dict[Tensor, int], sums: Sums) -> Borrower | None:
    """The loans of a module, whose owned parameters are taken out of `left`; None if it has none."""
    users: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for part in parts:
        for name, p in part._parameters.items():
            if p is not None and p in left:
                users.setdefault(p, []).append((part, name))
    loans = [Loan(cast(nn.Parameter, p), left.pop(p), where, sums) for p, where in users.items()]
    return Borrower(module, loans, sums) if loans else None
