"""Run the router alone, in the foreground.

Against any OpenAI-compatible upstream; for launchd, systemd, containers and benchmarks. Its first
line is its address.

examples:
  llmstack serve                            # before this project's engine
  llmstack serve --upstream http://127.0.0.1:8080 --port 0
"""

from __future__ import annotations

import os
from typing import Any, Sequence


def named_upstream(url: str, config: Any, llmstack: Any) -> Any:
    """What --upstream names. Errors: UserError where local_only forbids it."""
    upstream = llmstack.parse_upstream(url)
    if config.local_only and not llmstack.is_loopback(upstream.host):
        raise llmstack.UserError(f"{url} is not on this machine, and {llmstack.LOCAL_ONLY}",
                                 "take local_only out, or name another", 2)
    return upstream


def router_before(upstream: Any, places: Any, config: Any, host: str, llmstack: Any) -> Any:
    """The router before an upstream that this project does not run."""
    log = llmstack.Log("", os.environ.get("LOG_LEVEL", "info"))
    bundled = b""
    if not os.path.exists(places.models_ini):
        bundled = llmstack.read_resource("models.ini")

    def reload() -> Any:
        llmstack.check_run_trust(places)
        return llmstack.load_config(places, log.warning).on_channel(config.channel)

    setting = llmstack.Setting(
        loopback=llmstack.is_loopback(host),
        key=llmstack.api_key(os.environ),
        models_ini=places.models_ini,
        bundled=bundled,
        reload=reload,
        remedy="start it, or name another --upstream",
        env=os.environ,
    )
    return llmstack.RouterApp(config, llmstack.UpstreamApp(upstream, log), log, setting)


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("serve", __doc__)
    parser.add_argument("--upstream", metavar="URL",
                        help="where requests go (default: this project's engine)")
    parser.add_argument("--host", metavar="H", help="address to listen on (models.ini: host)")
    parser.add_argument("--port", metavar="P", type=llmstack.port_number,
                        help="port, 0 for any free one (models.ini: router_port)")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.check_run_trust(places)
    config = llmstack.load_config(places, llmstack.warn)
    config = config.on_channel(llmstack.chosen_channel(places, config))
    host, port = args.host or config.host, args.port
    if port is None:
        port = config.router_port
    llmstack.check_exposure(host, config, os.environ)
    if args.upstream:
        upstream = named_upstream(args.upstream, config, llmstack)
        app = router_before(upstream, places, config, host, llmstack)
    else:
        upstream = llmstack.Upstream("127.0.0.1", config.engine_port)
        log = llmstack.Log("", os.environ.get("LOG_LEVEL", "info"))
        plan = llmstack.Plan(places, config, host, port)
        app = llmstack.router_app(plan, llmstack.UpstreamApp(upstream, log), log)
    llmstack.more_files()
    llmstack.hold_little_memory()
    server = llmstack.listen(host, port, app)
    address = llmstack.base_url(host, server.server_port)
    llmstack.say(f"{address} is the router, upstream {upstream.url}")
    llmstack.run_until_signal(server, app)
    return 0
