"""A batch that several processes hold together: its statistics and sums, as SyncBatchNorm has them.

A channel's statistics are gathered once, where it is produced, and its sums added up once, where it
settles. Recomputing takes no communication.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def several() -> bool:
    """Whether there may be other processes."""
    return dist.is_available() and dist.is_initialized()


def name_of(group: dist.ProcessGroup | None) -> str:
    """Of the processes that a SyncBatchNorm synchronises with; empty where it is alone."""
    group = group or dist.group.WORLD
    # of a group that this process is not in, there are -1
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _processes(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


def gather(moments: Tensor, rows: int, group: str) -> Tensor:
    """Mean and biased variance (2, C) of all processes' rows in place of those of this one's,
    merged in order (Chan et al., 1979).

    Returns (2,): this process's share in the rows, and how many there are.
    """
    processes = _processes(group)
    wide = moments.to(torch.float64)
    mine = torch.cat((wide.flatten(), wide.new_full((1,), rows)))
    each = mine.new_empty((processes.size(), len(mine)))
    dist.all_gather(list(each.unbind()), mine, processes)
    (means, variances), counts = each[:, :-1].view(len(each), 2, -1).unbind(1), each[:, -1:]
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    moments[0], moments[1] = mean, (share * (variances + (means - mean).square())).sum(0)
    return torch.stack((rows / total, total))


def add_up(sums: Tensor, share: Tensor, group: str) -> Tensor:
    """Sums (2, C) over all processes' rows, scaled by this one's share in them: divided by its own
    rows they are means over all.
    """
    total = sums.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_processes(group))
    return total * share


def as_of_two(statistics: Tensor) -> Tensor:
    """Those of all processes' rows with variances that are unbiased as those of two rows are."""
    total = statistics[1, -1]
    return torch.stack((statistics[0], statistics[1] * (total / (total - 1) / 2)))
