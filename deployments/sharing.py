"""Plans and artifacts for the other nodes of a Ray cluster, without any storage that they share."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError

from optim.share import pack

logger = logging.getLogger(__name__)
_KEEPER = "pt2-serve-plans"
_NAMESPACE = "pt2-serve"
#: What the keeper holds in its own memory; those not asked for longest go.
_MOST_BYTES = 2 * 10**9
#: How often a replica looks whether there are several nodes, and whether its entry is still kept.
_EVERY_S = 30.0
_TIMEOUT_S = 60.0


class PlanKeeper:
    """Entries of compile caches, packed, by name; an actor, one in a cluster."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._entries: OrderedDict[str, bytes] = OrderedDict()

    def has(self, entry: str) -> bool:
        """Say whether an entry is here."""
        return entry in self._entries

    def get(self, entry: str) -> bytes | None:
        """Return an entry, or None."""
        if entry in self._entries:
            self._entries.move_to_end(entry)
        return self._entries.get(entry)

    def put(self, entry: str, packed: bytes) -> None:
        """Keep an entry; others go where there is no room for it."""
        self._entries[entry] = packed
        self._entries.move_to_end(entry)
        while sum(map(len, self._entries.values())) > self._most_bytes and len(self._entries) > 1:
            self._entries.popitem(last=False)


class ClusterShare:
    """What the replicas of a Ray cluster find on each other's nodes (`optim.share.Share`).

    With a single node there is no actor and nothing to do. Who may call actors may run code in the cluster anyway, so
    what comes from there is not signed; it is checked to be whole.
    """

    name = "another node of the cluster"

    def __init__(self) -> None:
        self._offered: dict[str, Path] = {}
        self._anew: set[str] = set()
        self._next = 0.0

    def get(self, entry: str) -> bytes | None:
        """Ask the cluster's keeper."""
        if not _is_cluster():
            return None
        try:
            keeper = ray.get_actor(_KEEPER, namespace=_NAMESPACE)
        except ValueError:  # nobody has left anything yet
            return None
        return cast("bytes | None", ray.get(keeper.get.remote(entry), timeout=_TIMEOUT_S))

    def offer(self, entry: str, folder: Path, *, anew: bool = False) -> None:
        """Remember an entry; `publish` hands it over."""
        self._offered[entry] = folder
        if anew:
            self._anew.add(entry)

    def publish(self) -> None:
        """Give the keeper what it does not have, at most every half minute; blocks meanwhile, and never raises.

        Again and again, since nodes may come later, and the keeper may have gone with its own.
        """
        if not self._offered or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY_S
        try:
            if not _is_cluster():
                return
            keeper: Any = (
                ray.remote(PlanKeeper)
                .options(name=_KEEPER, namespace=_NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0)
                .remote()
            )
            for entry, folder in list(self._offered.items()):
                if entry not in self._anew and ray.get(keeper.has.remote(entry), timeout=_TIMEOUT_S):
                    continue
                if not folder.is_dir():  # evicted here
                    del self._offered[entry]
                    continue
                ray.get(keeper.put.remote(entry, pack(folder)), timeout=_TIMEOUT_S)
                self._anew.discard(entry)
                logger.info("other nodes find the plan %s now", entry)
        except (RayError, OSError) as error:
            logger.warning("other nodes cannot be given the plan now: %s", error)


def _is_cluster() -> bool:
    return len([node for node in ray.nodes() if node["Alive"]]) > 1
