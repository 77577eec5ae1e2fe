"""The speed of this machine: how many CPU threads to use, and whether a run is slower than it
should be."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

SHAPE = (512, 256, 512)  # of the matrix product that is timed
FLOPS = 2 * math.prod(SHAPE)
# Pace suggests fewer threads if steps are SLOWER times slower than they should be, and a product
# with fewer threads is FASTER times faster.
SLOWER, FASTER = 4.0, 1.5
LOOKS = 3  # how often a run may time fewer threads


class Threads(NamedTuple):
    """The number of CPU threads, why it was chosen, and the FLOP/s of a matrix product with it."""

    count: int
    reason: str = ""
    speed: float = 0.0  # 0: not measured, because nothing depends on it


def pick_threads(asked: int | None, device: torch.device) -> Threads:
    """Set the number of CPU threads: `asked`, or the fastest of all, half, a quarter...

    On a shared or small machine a few threads can be several times faster than all.
    """
    most = asked or torch.get_num_threads()
    torch.set_num_threads(most)
    if device.type != "cpu" or most == 1:
        return Threads(most)
    seconds = {count: product_seconds(count) for count in ([most] if asked else halves(most))}
    best = min(seconds, key=seconds.__getitem__)
    faster = seconds[most] / seconds[best]
    if faster < 1.25:
        best = most
    torch.set_num_threads(best)
    reason = "" if best == most else f"{faster:.1f} times as fast as {most} on this machine now"
    return Threads(best, reason, FLOPS / seconds[best])


def halves(most: int) -> list[int]:
    """most, most/2, most/4, ..., 1."""
    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return counts


def product_seconds(threads: int, budget: float = 0.1) -> float:
    """Seconds for a small matrix product with this number of threads: the minimum over the runs
    that fit in the budget."""
    torch.set_num_threads(threads)
    a, b = torch.ones(SHAPE[:2]), torch.ones(SHAPE[1:])
    a @ b
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        best = min(best, (time.perf_counter() - start) / 10)
    return best


class Pace:
    """Notices that others have taken the machine's cores since a run began."""

    def __init__(self, threads: Threads, flops_per_token: float):
        self.threads, self.flops_per_token, self.looks = threads, flops_per_token, LOOKS

    def remark(self, tokens_per_second: float) -> str:
        """A line that suggests fewer threads, once in a run; otherwise "".

        If steps are far slower than the ledger's FLOPs and the first product suggest, the product
        is timed again, also with fewer threads. If these are not faster, the layers themselves are
        slow.
        """
        count, _, speed = self.threads
        slower = speed / (tokens_per_second * self.flops_per_token)
        if slower < SLOWER or count == 1 or not self.looks:
            return ""
        self.looks -= 1
        seconds = {each: product_seconds(each) for each in halves(count)}
        torch.set_num_threads(count)
        best = min(seconds, key=seconds.__getitem__)
        faster = seconds[count] / seconds[best]
        if faster < FASTER:
            return ""
        self.looks = 0
        return (
            f"steps are {slower:.0f} times slower than the ledger and a matrix product suggest; "
            f"{best} of {count} threads are {faster:.1f} times as fast now: "
            f"Ctrl-C, then --resume with --threads {best}"
        )
