"""A web server that ends on Ctrl-C without a traceback, whatever its clients are doing."""

from __future__ import annotations

import logging
import socket

from uvicorn import Server


class EndingServer(Server):
    """A server that ends while connections are open, which could last as long as their clients.

    uvicorn waits for them as long as its configuration says (``timeout_graceful_shutdown``), cuts
    those that are left, and logs a traceback for each. After a second Ctrl-C it does not wait.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is open, without a traceback for each connection that is cut."""
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn then leaves out what the application does at its end
            await self.lifespan.shutdown()
