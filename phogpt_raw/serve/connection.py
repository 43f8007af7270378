"""A connection that is closed if the client does not send its request's headers in time.

uvicorn closes a connection that is idle between two requests. But it waits without limit for
headers that do not arrive. A few thousand such connections would use up all connections that the
server can have at the same time.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30  # seconds within which a request's first line and headers must arrive


class Connection(H11Protocol):
    """uvicorn's connection. It is closed if the headers are not complete after HEAD_S seconds."""

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def connection_lost(self, error: Exception | None) -> None:
        self.stop_watching()
        super().connection_lost(error)

    def watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self.stop_watching()
        elif self.late is None:
            self.late = self.loop.call_later(HEAD_S, self.transport.close)

    def stop_watching(self) -> None:
        if self.late:
            self.late.cancel()
            self.late = None
