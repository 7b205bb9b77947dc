"""Who may write for a part of the source: leases, and the numbers that fence off a collector that lost one.

A lease is a key with expiry, so a collector that was frozen past it wakes without knowing. Its writes are refused by
a number that each taking of a part raises, in this order:

    Redis      lease key, with expiry       nobody else begins while it lives         Coordination.acquire_leases
    database   parts.lease_epoch + 1        rows under a lower number are refused     Ledger.take_part
    Redis      fences[part] = lease_epoch   entries under another one are refused     Coordination.raise_fence

Only then is it looked what was left over (services/collector/storage.py): whatever the earlier collector wrote before
its number fell is seen, whatever it tries afterwards is refused. Each write and its check are one step, a transaction
or a script. A Redis that lost its data knows no number, and refuses until the part is taken again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lease:
    """One taking of a part."""

    part: int
    owner: str
    """The collector's name, unique per process."""
    epoch: int
    """The fencing number, from 1: raised each time that the part is taken."""
