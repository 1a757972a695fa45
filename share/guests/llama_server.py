"""Serve like llama-server: xllamacpp runs llama.cpp's HTTP server inside a Python process.

xllamacpp reads no command line, so this does. It runs in the Python that xllamacpp is installed in.
Flags, defaults and meanings are those of llama.cpp's common/arg.cpp at the build llmstack pins.
What cannot be served exits with 1 and one line that begins with "error:", as llama-server does; an
unknown flag among them, even before --version, by which llmstack finds out what a build takes.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import socket
import sys
import time
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

IS_WINDOWS = sys.platform == "win32"
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20,
            "bf16": 30}
SPECULATION = ("none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark",
               "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
RANK = 4                                        # the pooling of a reranker
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"     # names of a mixture's tensors


class StandInError(Exception):
    """The server cannot start; the message is one line, without its leading "error:"."""


def within(kind: Callable[[str], float], low: float,
           high: float = 2**31 - 1) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:            # false for nan, too
            raise ValueError(text)
        return value

    return read


def comma_list(text: str) -> List[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def thread_count(text: str) -> int:
    """llama-server reads 0 and -1 as all hardware threads; a container's share is its affinity."""
    if int(text) > 0:
        return int(text)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def layer_count(text: str) -> int:
    named = {"auto": -1, "all": -2}
    return named[text] if text in named else int(text)


def slot_count(text: str) -> int:
    return -1 if text == "-1" else int(within(int, 1)(text))


def directory(text: str) -> str:
    """A directory as llama.cpp puts file names behind it."""
    if not os.path.isdir(text):
        raise StandInError(f"not a directory: {text}")
    return os.path.join(text, "")


def text_of(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise StandInError(f"cannot read {path}: {reason}") from None


def key_lines(path: str) -> List[str]:
    lines = [line.strip() for line in text_of(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def proportions(text: str) -> List[float]:
    """How a model is spread over devices; CommonParams wants one for each device there could be."""
    values = [within(float, 0)(part) for part in re.split("[,/]", text)]
    return [*values, *[0.0] * 128][:128]


def adapters(text: str) -> List[Tuple[str, float]]:
    return [(path, 1.0) for path in comma_list(text)]


def scaled_adapters(text: str) -> List[Tuple[str, float]]:
    found = []
    for part in comma_list(text):
        path, _, scale = part.rpartition(":")
        found.append((path, float(scale)))
    return found


def overrides(text: str) -> List[str]:
    """Where tensors are kept: PATTERN=BUFFER, ..."""
    rules = comma_list(text)
    if not all("=" in rule for rule in rules):
        raise ValueError(text)
    return rules


def first_experts(text: str) -> List[str]:
    layers = int(within(int, 0)(text))
    return [rf"blk\.{layer}{EXPERTS}=CPU" for layer in range(layers)]


def speculation(text: str) -> List[int]:
    return [SPECULATION.index(name) for name in text.split(",")]


class Option(NamedTuple):
    flags: str                                  # its spellings
    target: str                                 # attribute of CommonParams
    value: Any                                  # reader or table of a value; else the meaning


# A flag in two rows sets both. A list adds to what the flag has said before.
OPTIONS = (
    Option("--version", "version", True),
    # ---- the model
    Option("-m --model", "model.path", str),
    Option("-hf -hfr --hf-repo", "model.hf_repo", str),
    Option("-hff --hf-file", "model.hf_file", str),
    Option("--offline", "offline", True),
    Option("-a --alias", "model_alias", comma_list),
    Option("-mm --mmproj", "mmproj.path", str),
    Option("--no-mmproj --no-mmproj-auto", "no_mmproj", True),
    Option("--no-mmproj-offload", "mmproj_use_gpu", False),
    Option("--lora", "lora_adapters", adapters),
    Option("--lora-scaled", "lora_adapters", scaled_adapters),
    Option("-md --model-draft --spec-draft-model", "speculative.draft.mparams.path", str),
    Option("--spec-type", "speculative.types", speculation),
    Option("--spec-draft-n-max", "speculative.draft.n_max", within(int, 0)),
    Option("-ngld --spec-draft-ngl --gpu-layers-draft --n-gpu-layers-draft",
           "speculative.draft.n_gpu_layers", layer_count),
    # ---- memory and speed
    Option("-c --ctx-size", "n_ctx", within(int, 0)),
    Option("-np --parallel", "n_parallel", slot_count),
    Option("-kvu --kv-unified", "kv_unified", True),
    Option("-no-kvu --no-kv-unified", "kv_unified", False),
    Option("-b --batch-size", "n_batch", within(int, 1)),
    Option("-ub --ubatch-size", "n_ubatch", within(int, 1)),
    Option("-t --threads", "cpuparams.n_threads", thread_count),
    Option("-tb --threads-batch", "cpuparams_batch.n_threads", thread_count),
    Option("-ngl --gpu-layers --n-gpu-layers", "n_gpu_layers", layer_count),
    Option("-sm --split-mode", "split_mode", {"none": 0, "layer": 1, "row": 2, "tensor": 3}),
    Option("-ts --tensor-split", "tensor_split", proportions),
    Option("-mg --main-gpu", "main_gpu", within(int, 0)),
    Option("-ot --override-tensor", "tensor_buft_overrides", overrides),
    Option("-cmoe --cpu-moe", "tensor_buft_overrides", [EXPERTS + "=CPU"]),
    Option("-ncmoe --n-cpu-moe", "tensor_buft_overrides", first_experts),
    Option("-fit --fit", "fit_params", {"on": True, "off": False}),
    Option("-fa --flash-attn", "flash_attn_type", {"on": 1, "off": 0, "auto": -1}),
    Option("-ctk --cache-type-k", "cache_type_k", KV_TYPES),
    Option("-ctv --cache-type-v", "cache_type_v", KV_TYPES),
    Option("-lm --load-mode", "load_mode", {"auto": -1, "none": 0, "mmap": 1, "mlock": 2}),
    Option("--no-warmup", "warmup", False),
    Option("--swa-full", "swa_full", True),
    # ---- what is kept of a conversation
    Option("-cram --cache-ram", "cache_ram_mib", within(int, -1)),
    Option("--cache-reuse", "n_cache_reuse", within(int, 0)),
    Option("-ctxcp --ctx-checkpoints --swa-checkpoints", "n_ctx_checkpoints", within(int, 0)),
    Option("--slot-save-path", "slot_save_path", directory),
    Option("-sps --slot-prompt-similarity", "slot_prompt_similarity", within(float, 0)),
    # ---- the context and the sampler
    Option("--rope-scaling", "rope_scaling_type", {"none": 0, "linear": 1, "yarn": 2}),
    Option("--rope-scale", "rope_freq_scale", lambda text: 1 / within(float, 1e-6)(text)),
    Option("--yarn-orig-ctx", "yarn_orig_ctx", within(int, 0)),
    Option("--rope-freq-base", "rope_freq_base", within(float, 0)),
    Option("--rope-freq-scale", "rope_freq_scale", within(float, 0)),
    Option("--yarn-ext-factor", "yarn_ext_factor", within(float, -1)),
    Option("--yarn-attn-factor", "yarn_attn_factor", within(float, -1)),
    Option("--yarn-beta-slow", "yarn_beta_slow", within(float, -1)),
    Option("--yarn-beta-fast", "yarn_beta_fast", within(float, -1)),
    Option("--temp --temperature", "sampling.temp", lambda x: max(0.0, within(float, -1e6)(x))),
    Option("--top-p", "sampling.top_p", within(float, -1e6)),
    Option("--top-k", "sampling.top_k", within(int, -(2**31))),
    Option("--min-p", "sampling.min_p", within(float, -1e6)),
    Option("--repeat-penalty", "sampling.penalty_repeat", within(float, 1e-6)),
    # ---- templates and thinking
    Option("--jinja", "use_jinja", True),
    Option("--no-jinja", "use_jinja", False),
    Option("--chat-template", "chat_template", str),
    Option("--chat-template-file", "chat_template", text_of),
    Option("--reasoning-format", "reasoning_format",
           {"none": 0, "auto": 1, "deepseek-legacy": 2, "deepseek": 3}),
    Option("--reasoning-budget", "sampling.reasoning_budget_tokens", within(int, -1)),
    # ---- embeddings
    Option("--embedding --embeddings --rerank --reranking", "embedding", True),
    Option("--rerank --reranking", "pooling_type", RANK),
    Option("--pooling", "pooling_type", {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": RANK}),
    # ---- the HTTP server
    Option("--host", "hostnames", comma_list),
    Option("--port", "port", within(int, 0, 65535)),
    Option("--api-key", "api_keys", comma_list),
    Option("--api-key-file", "api_keys", key_lines),
    Option("--cors-origins", "cors_origins", str),
    Option("--cors-origins", "cors_origins_explicit", lambda text: True),
    Option("--cors-methods", "cors_methods", str),
    Option("--cors-headers", "cors_headers", str),
    Option("--cors-credentials", "cors_credentials", True),
    Option("--no-cors-credentials", "cors_credentials", False),
    Option("--metrics", "endpoint_metrics", True),
    Option("--props", "endpoint_props", True),
    Option("--slots", "endpoint_slots", True),
    Option("--no-slots", "endpoint_slots", False),
)


def takes_value(option: Option) -> bool:
    return callable(option.value) or isinstance(option.value, dict)


def read_value(option: Option, flag: str, text: str) -> Any:
    """What a row of the table makes of its flag's value. Errors: StandInError."""
    try:
        if isinstance(option.value, dict):
            return option.value[text]
        return option.value(text) if callable(option.value) else option.value
    except (KeyError, ValueError):
        raise StandInError(f"invalid value for {flag}: {text}") from None


def parse_command_line(argv: Sequence[str]) -> Dict[str, Any]:
    """CommonParams attribute -> value. Errors: StandInError.

    "version" ends the reading, as llama-server's --version exits there.
    """
    rows: Dict[str, List[Option]] = {}
    for option in OPTIONS:
        for flag in option.flags.split():
            rows.setdefault(flag, []).append(option)
    wanted: Dict[str, Any] = {}
    words = iter(argv)
    for flag in words:
        if flag not in rows:
            raise StandInError(f"invalid argument: {flag}")
        text = ""
        if takes_value(rows[flag][0]):
            try:
                text = next(words)
            except StopIteration:
                raise StandInError(f"{flag} needs a value") from None
        for option in rows[flag]:
            value = read_value(option, flag, text)
            if option.target in ("api_keys", "lora_adapters", "tensor_buft_overrides"):
                value = wanted.get(option.target, []) + value
            wanted[option.target] = value
        if "version" in wanted:
            break
    return wanted


def check_model(path: str) -> None:
    """Errors: StandInError for what is no GGUF file here."""
    if not path:
        raise StandInError("--model or --hf-repo is required")
    try:
        with open(path, "rb") as model:
            if model.read(4) != b"GGUF":
                raise StandInError(f"not a GGUF file: {path}")
    except OSError as error:
        raise StandInError(f"cannot read the model {path}: {error.strerror}") from None


def check_port(host: str, port: int) -> None:
    """Errors: StandInError where the port cannot be listened on: Server() would only be silent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if not IS_WINDOWS:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                reason = f"port {port} is taken"
            raise StandInError(f"couldn't bind HTTP server socket, {host}: {reason}") from None


def set_attribute(params: Any, target: str, value: Any) -> None:
    *owners, name = target.split(".")
    for owner in owners:
        params = getattr(params, owner)
    setattr(params, name, value)


def common_params(xllamacpp: Any, wanted: Dict[str, Any]) -> Any:
    """The CommonParams that llama-server's own parser would have made of `wanted`."""
    params = xllamacpp.CommonParams()
    params.port, params.n_parallel = 9931, -1
    params.default_template_kwargs = {"preserve_reasoning": "true"}
    params.hf_token = os.environ.get("HF_TOKEN", "")
    params.api_keys = comma_list(os.environ.get("LLAMA_API_KEY", ""))
    values = dict(wanted)
    if "lora_adapters" in values:
        found = values["lora_adapters"]
        values["lora_adapters"] = [xllamacpp.CommonAdapterLoraInfo(*one) for one in found]
    if "tensor_buft_overrides" in values:
        values["tensor_buft_overrides"] = ",".join(values["tensor_buft_overrides"])
    for target, value in values.items():
        try:
            set_attribute(params, target, value)
        except (OverflowError, TypeError, ValueError) as error:
            raise StandInError(f"invalid value for {target}: {value}: {error}") from None
    # Without its bit, sampling metadata in the GGUF overrides the flag.
    for name, bit in xllamacpp.common_params_sampling_config.__members__.items():
        attribute = name.replace("COMMON_PARAMS_SAMPLING_CONFIG_", "").lower()
        if f"sampling.{attribute}" in values:
            params.sampling.user_sampling_config |= bit
    if values.get("n_ctx") == 0:                # the model's full context: --fit may not shrink it
        params.fit_params_min_ctx = -1
    if params.model.hf_repo:                    # Server() demands a path; the download replaces it
        params.model.path = f"{params.model.hf_repo} (not downloaded)"
    return params


def serve_until_signal(server: object) -> None:
    """Hold `server` until SIGTERM or SIGINT, then exit 0 at once.

    Destroying a Server holds the GIL and waits for every client: os._exit is what no request in
    flight can delay. The wakeup socket is there because a signal that lands on one of llama.cpp's
    threads does not end the main thread's sleep.
    """
    wakeup, signalled = socket.socketpair()
    signalled.setblocking(False)
    signal.set_wakeup_fd(signalled.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    wakeup.recv(1)
    os._exit(0)


def serve(argv: Sequence[str]) -> int:
    """The exit code, where there is nothing to serve. Errors: StandInError, ImportError."""
    wanted = parse_command_line(argv)
    # Loading holds the GIL, so a Python handler would run after it, and KeyboardInterrupt crashes
    # xllamacpp's import.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    xllamacpp = importlib.import_module("xllamacpp")
    if "version" in wanted:
        sys.stderr.write(f"version: xllamacpp {xllamacpp.__version__} (llama.cpp)\n")
        return 0
    params = common_params(xllamacpp, wanted)
    if not params.model.hf_repo:
        check_model(params.model.path)
    for host in params.hostnames:
        check_port(host, params.port)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        time.sleep(0.2)                         # llama.cpp's own thread finishes its log
        raise StandInError(f"llama.cpp could not start {params.model.path}:"
                           " see its log above") from None
    serve_until_signal(server)
    return 0


def main(argv: Sequence[str]) -> int:
    try:
        return serve(argv)
    except (StandInError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
