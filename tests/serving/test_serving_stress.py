from __future__ import annotations

import asyncio

from serving_live import Live, until
from serving_stress import check, stress


def test_300_requests_of_64_clients_are_each_answered_once(server: Live) -> None:
    ends = asyncio.run(stress(server.url, 300, seed=0))
    until(lambda: not server.bridge._open and not server.engine._running and not server.engine._waiting)
    check(ends, 300, server.url)
    assert ends["cancelled"] > 10
    assert server.engine._memory.used == 0
    assert not server.engine._known
