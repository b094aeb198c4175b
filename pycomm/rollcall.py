"""How the launcher knows which of its ranks have called init(): each reports to a socket that is named after
the job's address. If another launcher started the ranks, nobody listens, which is no error."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def report(address: str, rank: int, calls: int) -> None:
    """Reports that `rank` makes its call number `calls` of init(), counted from 1."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        to.sendto(f"{rank} {calls}".encode(), _name(address))


class Rollcall:
    """The launcher's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(_name(address))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def hear(self) -> list[tuple[int, int]]:
        """The reports since the last time, as (rank, calls)."""
        heard: list[tuple[int, int]] = []
        while True:
            try:
                data, credentials, _, _ = self._socket.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
            except BlockingIOError:
                return heard
            # Any user may send to an abstract name: reports of other users are ignored.
            if [_CREDENTIALS.unpack(value)[1] for _, _, value in credentials] == [os.geteuid()]:
                rank, calls = map(int, data.split())
                heard.append((rank, calls))


def _name(address: str) -> str:
    return f"\0pycomm-rollcall-{address}"
