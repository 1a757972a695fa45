"""Run LiteLLM's proxy with a guard before its application.

The first argument is the SHA-256 of the configuration, the others are LiteLLM's own, --config the
first of them.
A configuration that has changed since is not run: LiteLLM imports the Python modules it names, and
nobody may have looked at it.

This runs in LiteLLM's Python. LiteLLM answers every origin and lets it read the answer, and the
proxy here asks for no key: without the guard any web page could spend its user's money. The guard's
rule is refusal() of llmstack.py in its own words; a test holds the two to the same answers.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import re
import sys
from typing import Any, Dict, Sequence

LOOPBACK = re.compile(
    r"(?:localhost|[a-z0-9.-]+\.localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]|::1)\.?(?::[0-9]{1,5})?\Z")


def is_loopback(host: str) -> bool:
    """True for a host, with or without a port, that can only mean this machine."""
    return bool(LOOPBACK.match(host.strip().lower()))


def refusal(headers: Dict[str, str]) -> str:
    """Why a request may come from a web page that has no business here, or "".

    A page that resolved its own name to 127.0.0.1 gives itself away by Host, a page of another site
    by Origin, or by Sec-Fetch-Site where its request has no Origin.
    """
    host, origin = headers.get("host", ""), headers.get("origin", "")
    if host and not is_loopback(host):
        return f"Host {host!r} is not this machine; use 127.0.0.1"
    if origin:
        if not is_loopback(origin.split("://", 1)[-1]):
            return f"Origin {origin!r} may not use LiteLLM"
        return ""
    if headers.get("sec-fetch-site", "").lower() == "cross-site":
        return "cross-site requests may not use LiteLLM"
    return ""


class WebGuard:
    """ASGI: refuses what a web page of another site sends."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers: Dict[str, str] = {}
        for name, value in scope.get("headers") or ():      # "lifespan" has none
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        wrong = refusal(headers)
        if not wrong:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refuse(send, wrong)


async def refuse(send: Any, message: str) -> None:
    error = {"message": message, "type": "forbidden", "param": None, "code": None}
    await send({"type": "http.response.start", "status": 403,
                "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def main(argv: Sequence[str]) -> int:
    """Serve until a signal. LiteLLM ends the process itself where it cannot start."""
    digest, _, path = argv[:3]
    with open(path, "rb") as file:
        if hashlib.sha256(file.read()).hexdigest() != digest:
            print(f"{path} has changed since the start; `llmstack restart` takes it in.")
            return 1
    here = os.getcwd()
    # Importing LiteLLM puts its working directory, and the one two above, on sys.path: a project
    # that somebody else wrote is no place for modules.
    os.chdir(os.path.dirname(sys.executable))
    # Of 8 s that the imports take, 2 s would go to looking for garbage where there is none.
    gc.disable()
    cli = importlib.import_module("litellm.proxy.proxy_cli")
    server = importlib.import_module("litellm.proxy.proxy_server")
    gc.enable()
    os.chdir(here)
    server.app.add_middleware(WebGuard)
    sys.argv = ["litellm", *argv[1:]]
    cli.run_server()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
