"""JupyterLab on the notebooks, on this machine's own address alone: for make lab, as any user, with a home or without.

Words on stderr say how a browser on another machine reaches it: by a tunnel, since nothing else listens.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys

from experiments import home
from experiments.study import ROOT

ADDRESS, FIRST_PORT, PORTS = "127.0.0.1", 8888, 50


def free_port() -> int:
    """The first free port from FIRST_PORT on, or any where none of PORTS is."""
    for port in (*range(FIRST_PORT, FIRST_PORT + PORTS), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no port of {ADDRESS} is free")


def options(port: int) -> list[str]:
    """Arguments of jupyter lab. Root, as in a container, is as good as any user where only this machine can connect; a
    browser is opened where there is a display."""
    given = [f"--ServerApp.ip={ADDRESS}", f"--ServerApp.port={port}", f"--ServerApp.root_dir={ROOT / 'notebooks'}"]
    if os.geteuid() == 0:
        given.append("--ServerApp.allow_root=True")
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        given.append("--ServerApp.open_browser=False")
    return given


def hint(port: int) -> str:
    """Way to it from another machine, or out of a container."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id that the machine does not know
        user = "USER"
    host = socket.gethostname()
    return (
        f"JupyterLab listens on {ADDRESS}:{port} alone; its address with the token follows. From another machine: ssh "
        f"-N -L {port}:{ADDRESS}:{port} {user}@{host}, then open that address there; in a container, start it with "
        f"--network host."
    )


def main() -> None:
    """JupyterLab in the foreground, until Ctrl-C."""
    home.provide()
    port = free_port()
    print(hint(port), file=sys.stderr, flush=True)
    from jupyterlab.labapp import main as lab  # looks for a home as it is imported

    lab(options(port))


if __name__ == "__main__":
    main()
