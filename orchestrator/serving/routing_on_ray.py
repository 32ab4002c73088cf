"""Which replica gets a request: the one that has fewest of this process's requests.

Serve's own choice goes by the lengths of queues that replicas tell. What one tells in a crowd arrives late, so afterwards a
length that is long past is believed, and an idle replica is passed over for the ten seconds until that is forgotten. The
gateway sends nearly all requests there are, and knows of each when it ends.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig


class FewestUnderWay(PowerOfTwoChoicesRequestRouter):
    """Belongs to one handle and one event loop."""

    def initialize_state(self, **settings: Any) -> None:
        self.under_way: Counter[Any] = Counter()
        """By replica."""

    def on_send_request(self, replica_id: Any) -> None:
        super().on_send_request(replica_id)
        self.under_way[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self.under_way[replica_id] = max(0, self.under_way[replica_id] - 1)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self.under_way.pop(replica_id, None)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """One after the other is asked to take it."""
        near = self.apply_locality_routing(pending_request)  # tells Serve's loop as well to pause when all are busy
        drawn = [replica for replica in candidate_replicas if replica.replica_id in near]
        random.shuffle(drawn)  # decides between equals
        return [[replica] for replica in sorted(drawn, key=lambda replica: self.under_way[replica.replica_id])]


ROUTING = RequestRouterConfig(request_router_class=f"{__name__}.{FewestUnderWay.__name__}")
