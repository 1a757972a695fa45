"""llama-swap's cmdStop: PORT MODEL PID. The daemon on PORT parks the model, then its server ends.

It runs at every swap, so it imports next to nothing. Whatever goes wrong, the server is told to
end.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

PARK_S = 15                                     # as long as the daemon takes at most


def park(port: int, model: str) -> None:
    """Returns once the model is parked. Errors: OSError."""
    request = f"POST /llmstack/park/{model} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    request += "Content-Length: 0\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), PARK_S) as sock:
        sock.sendall(request.encode())
        while sock.recv(4_096):
            pass


def end(pid: int) -> None:
    """As llama-swap ends a server that has no cmdStop. Errors: OSError."""
    if sys.platform == "win32":
        import subprocess
        subprocess.call(["taskkill", "/f", "/t", "/pid", str(pid)])
        return
    group = os.getpgid(pid)
    if group == pid:
        os.killpg(group, signal.SIGTERM)
    else:
        os.kill(pid, signal.SIGTERM)


def main(argv: list[str]) -> int:
    try:
        park(int(argv[1]), argv[2])
    except OSError:
        pass
    finally:
        end(int(argv[3]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
