"""Sockets that acknowledge at once what they receive.

Some servers, Ceph's radosgw as it comes among them, send the head and the body of a short reply one after the other and
hold the second until the first is acknowledged (Nagle). Linux delays that for 40 ms, which adds up over small requests.
"""

from __future__ import annotations

import socket
from typing import Any


class PromptSocket(socket.socket):
    """Asks for an acknowledgement after every `recv`, since Linux soon forgets that it was asked for."""

    def recv(self, *arguments: Any) -> bytes:
        """As `socket.recv`."""
        data = super().recv(*arguments)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


def prompt_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an entry of `socket.getaddrinfo`; a plain one where the system has no such option."""
    family, kind, protocol = address[:3]
    return (PromptSocket if hasattr(socket, "TCP_QUICKACK") else socket.socket)(family, kind, protocol)
