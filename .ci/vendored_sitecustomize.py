"""Lets the README's code run as it stands: whoever asks for port 8000 gets a free one.

Children have this as sitecustomize.py; FLOWSERVER_PORTS names the file in which each
port is written down.
"""

from __future__ import annotations

import os
import socket
from typing import Any

README_PORT = 8000
bind = socket.socket.bind


def bind_elsewhere(self: socket.socket, address: Any) -> None:
    is_readme_port = isinstance(address, tuple) and address[1] == README_PORT
    bind(self, (address[0], 0, *address[2:]) if is_readme_port else address)
    if is_readme_port:
        with open(os.environ["FLOWSERVER_PORTS"], "a") as ports:
            ports.write(f"{self.getsockname()[1]}\n")


socket.socket.bind = bind_elsewhere  # type: ignore[assignment, method-assign]
