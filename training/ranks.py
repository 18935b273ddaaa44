"""The ranks of a run: the rank of this process, and all communication except that of the gradients.

A single process is a world of 1: there is no process group, and every function is the identity. Small numbers and Python objects are sent
with gloo on the CPU, even if gradients use NCCL. So there is no wait for the device, and a rank that hangs or has ended causes an
exception with a remedy here, before the watchdog of NCCL aborts the process.
"""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.machine import resolve_device
from training.settings import Settings
from training.validate import ConfigError

T = TypeVar("T")

# NCCL waits this much longer than gloo, so that gloo raises the error with the remedy first.
_NCCL_GRACE_S = 30

# Words in the RuntimeError that gloo, NCCL or the store raises if another rank does not answer or has ended.
_LOST_PEER = re.compile(
    r"timed? ?out|time ?limit|connection (closed|reset|refused)|broken pipe|gloo|nccl|socket|peer", re.IGNORECASE
)


class LostRanks(RuntimeError):
    """Another rank did not answer within `launcher.timeout_s`, or has ended; the message says what to check."""


def world_size() -> int:
    """The number of ranks according to the environment variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def leave_group() -> None:
    """Leave the process group.

    A gloo thread may still be freeing a message, and needs Python's lock for it. destroy_process_group holds that lock while it waits for
    the thread. Without the pause, a process that ends right after a step sometimes hangs (torch 2.13).
    """
    time.sleep(0.05)  # gives up the lock
    dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process as one of `world` ranks; `device` belongs to this rank."""

    rank: int
    world: int
    device: torch.device
    timeout_s: float = field(repr=False)
    control: Any = field(default=None, repr=False)  # the gloo group of all ranks; None in a world of 1

    @classmethod
    def init(cls, cfg: Settings) -> Ranks:
        """Join the process group that the environment variables of torchrun describe; a world of 1 has none.

        Of the configuration, `device` and `launcher.timeout_s` are used.

        Raises:
            ConfigError: more ranks on this node than CUDA devices.
            LostRanks: the other ranks did not join in time.
        """
        device, timeout_s, world = resolve_device(cfg)[0], cfg.launcher.timeout_s, world_size()
        if world == 1:
            return cls(0, 1, device, timeout_s)
        ranks = cls(int(os.environ["RANK"]), world, device, timeout_s)
        timeout = timedelta(seconds=timeout_s)
        with ranks.explained():
            if device.type == "cuda":
                device = _own_cuda_device(int(os.environ["LOCAL_RANK"]))
                grace = timedelta(seconds=_NCCL_GRACE_S)
                dist.init_process_group("nccl", timeout=timeout + grace, device_id=device)
                control = dist.new_group(backend="gloo", timeout=timeout)
            else:
                dist.init_process_group("gloo", timeout=timeout)
                control = dist.group.WORLD
        return replace(ranks, device=device, control=control)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the records."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if self.world > 1 and dist.is_initialized():
            leave_group()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A context in which an error of the backend about a lost rank becomes LostRanks."""
        try:
            yield
        except LostRanks:
            raise
        except RuntimeError as error:
            if self.world == 1 or not _LOST_PEER.search(str(error)):
                raise
            cause = str(error).strip().splitlines()[0]
            raise LostRanks(
                f"rank {self.rank} of {self.world} lost the others: a rank has ended, or did not answer for launcher.timeout_s={self.timeout_s:g} s. "
                "Look for the first error on the other ranks and nodes; if they were only slow, raise launcher.timeout_s. "
                f"Then continue from the last checkpoint with resume=auto ({cause})"
            ) from error

    # ---- tensors on the device ----

    def sum(self, t: Tensor) -> Tensor:
        """The sum over ranks of a tensor (any shape, on `device`), in place; every rank gets the same bits."""
        if self.world > 1:
            with self.explained():
                dist.all_reduce(t)
        return t

    def all_reduce_mean(self, t: Tensor) -> Tensor:
        """The mean over ranks of a floating tensor (any shape, on `device`), in place."""
        return self.sum(t).div_(self.world) if self.world > 1 else t

    # ---- numbers and objects, on the CPU ----

    def largest(self, *values: int) -> list[int]:
        """For each whole number, the largest of all ranks."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)
        with self.explained():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return numbers.tolist()

    def max(self, value: int) -> int:
        """The largest of the ranks' whole numbers."""
        return self.largest(value)[0]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.max(0)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's picklable value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        with self.explained():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's picklable value, in order of rank, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.explained():
            dist.all_gather_object(found, value, group=self.control)
        return found

    def require_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that every float32 tensor is bitwise equal on all ranks, by a checksum.

        Raises:
            RuntimeError: naming the first tensor that differs.
        """
        if self.world == 1:
            return
        sums = torch.stack([t.detach().flatten().view(torch.int32).sum(dtype=torch.int64) for t in tensors.values()])
        ours = sums.tolist()
        for rank, theirs in enumerate(self.gather_objects(ours)):
            for name, mine, other in zip(tensors, ours, theirs):
                if mine != other:
                    raise RuntimeError(
                        f"{name} is not the same on ranks {self.rank} and {rank}: the replicas differ; continue from "
                        "the last checkpoint with resume=auto, and if it happens again, check for faulty memory or different hardware"
                    )

    def from_main(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work(*arguments)` on rank 0; its result is returned, or its exception raised, on every rank."""
        if self.world == 1:
            return work(*arguments)
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(*arguments), None)
            except Exception as error:
                outcome = (None, _portable(error))
        value, raised = self.broadcast_object(outcome)
        if raised is not None:
            raise raised
        return value


def _own_cuda_device(local_rank: int) -> torch.device:
    here, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if wanted > here:
        raise ConfigError(
            [
                f"{wanted} ranks were started on this node, which has {here} CUDA devices; start {here}, or use device=cpu"
            ]
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _portable(error: Exception) -> Exception:
    """The error, or a RuntimeError with the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(str(error))
    return error


@contextmanager
def joined(cfg: Settings) -> Iterator[Ranks]:
    """The ranks of a run. Inside, an error of the backend about a lost rank becomes LostRanks; at the end this rank leaves the group.

    After an error it does not: NCCL would first wait for sums in which other ranks no longer take part.
    """
    ranks = Ranks.init(cfg)
    with ranks.explained():
        yield ranks
    ranks.close()
