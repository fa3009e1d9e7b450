"""Addresses of processes, as settings give them."""

from __future__ import annotations


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
      ValueError: with what is wrong.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise ValueError("must be HOST:PORT, for example 10.0.0.1:9999")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"the port {port!r} must be a number from 1 to 65535, as in {host}:9999")
    bracketed = host.startswith("[") and host.endswith("]")
    if not bracketed and (set(host) & set(":/@[] ") or host != host.strip()):
        raise ValueError(f"the host {host!r} must be a name or an address, without a scheme; IPv6 as in [::1]:9999")
    return host[1:-1] if bracketed else host, int(port)
