"""What another process answers is used only where its type is what it should be."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Iterator

import pytest

import llmstack
from tests import gguf_models

MODELS_INI = b"[code-fast]\nrole = fast\nmodel = p/x\n[code-smart]\nrole = agent\nhf_repo = o/r\nhf_file = f.gguf\n"
VALUES: list[Any] = [None, True, 0, -1, 1e308, 10 ** 400, float("nan"), float("inf"), "x", "\x1b[2J\x9b", "", [],
                     {}, [[]], {"state": 5}, {"state": "ready", "reason": ["x"]}, {"model": "code-fast"}]


class Router(ThreadingHTTPServer):
    """A router that gives a good models.ini and, of itself, whatever it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.running: bytes = b'{"running": []}'
        self.state: bytes = b"{}"
        self.other: bytes = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Router

    def do_GET(self) -> None:
        bodies = {"/models.ini": MODELS_INI, "/running": self.server.running,
                  "/llmstack/state": self.server.state}
        body = bodies.get(self.path, self.server.other)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def router() -> Iterator[Router]:
    server = Router()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def payloads(seed: int) -> Iterator[bytes]:
    """Rows of a state with values of every type in every place, and what is no JSON at all."""
    yield from (b"[" * 200_000, b'{"running":' * 50_000, b"NaN", b"\xff\xfe", b"5" * 10_000, b"null",
                b'{"running": [{"model": "code-smart", "state": "ready", "seconds": "x"}]}')
    dice = random.Random(seed)
    for _ in range(60):
        rows = [{key: dice.choice(VALUES) for key in ("model", "state", "seconds", "proxy", "cmd")}
                for _ in range(3)]
        rows.append({"model": "code-smart", "state": dice.choice(VALUES), "seconds": dice.choice(VALUES),
                     "proxy": dice.choice(["http://x:1", "x:" + "9" * 5000, 5])})
        yield json.dumps({"running": dice.choice([rows, rows[0], *VALUES]), "code-fast": dice.choice(VALUES),
                          "code-smart": {"state": dice.choice(VALUES), "reason": dice.choice(VALUES)}}).encode()


def test_no_answer_of_a_router_breaks_a_thin_clients_status(router: Router,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["install", "--external", router.url]) == 0
    for body in payloads(7):
        router.running = router.state = body
        capsys.readouterr()
        assert llmstack.main(["status"]) == 0, body[:300]
        out = capsys.readouterr().out
        assert "code-fast" in out
        assert all(line.isprintable() for line in out.splitlines()), out
    assert llmstack.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["running"] is True


def test_states_are_what_they_should_be_or_left_out(router: Router) -> None:
    host, port = "127.0.0.1", int(router.server_address[1])
    good = {"model": "a", "state": "ready", "seconds": 5}
    bad = [{**good, "model": ["a"]}, {**good, "state": 5}, {"model": "b"}, 5, None]
    odd = {"model": "c", "state": "ready", "seconds": "x", "proxy": f"http://127.0.0.1:{port}"}
    router.running = json.dumps({"running": [good, *bad, odd]}).encode()
    router.state = json.dumps({"a": {"state": "x", "reason": 5}, "b": "x", "c": None}).encode()
    upstream = llmstack.Upstream(host, port)
    assert llmstack._engine_states(upstream) == {"a": ("ready", 5.0), "c": ("ready", None)}
    assert llmstack._router_states(upstream) == {"a": {"state": "x"}}
    router.running = b"[" * 200_000
    assert llmstack._engine_states(upstream) is None


def test_an_answer_beyond_its_size_is_no_answer(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    router.state = json.dumps({"a": {"state": "x" * 10_000}}).encode()
    upstream = llmstack.Upstream("127.0.0.1", int(router.server_address[1]))
    assert llmstack._router_states(upstream)
    monkeypatch.setattr(llmstack, "MAX_ANSWER_BYTES", 1_000)
    assert llmstack._router_states(upstream) == {}


def test_a_router_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "REMOTE_PATIENCE_S", 0.3)
    gone = threading.Event()

    def drip(server: socket.socket) -> None:
        client, _ = server.accept()
        with client:
            client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            try:
                while not gone.wait(0.01):
                    client.sendall(b"1\r\n#\r\n")
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        try:
            assert llmstack.main(["install", "--external", f"http://127.0.0.1:{server.getsockname()[1]}"]) == 1
        finally:
            gone.set()
            thread.join()
    assert "no answer within 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"tag_name": "v1\x9b31m", "assets": 5}', b"5"],
                         ids=["deep", "escape", "number"])
def test_a_mirror_or_hub_that_answers_nonsense_is_one_line(router: Router, body: bytes, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    router.other = body
    monkeypatch.setenv("LLMSTACK_RELEASES_URL", router.url)
    assert llmstack.main(["install-llama-swap"]) == 1
    error = capsys.readouterr().err.splitlines()[0]
    assert "does not answer like GitHub's releases API" in error
    if body.startswith(b"["):
        with pytest.raises(llmstack.UserError, match="does not answer like a model hub"):
            llmstack.load_extra("check").ask_repo("o/r", ["f.gguf"], {"HF_ENDPOINT": router.url}, llmstack)


@pytest.mark.parametrize("body", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n[",
                                  b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n["],
                         ids=["nothing", "less", "chunk"])
def test_a_hub_that_breaks_off_is_one_line(body: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                client.sendall(body)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
            download = llmstack.load_extra("download")
            with pytest.raises(llmstack.UserError, match="model hub"):
                download.hub_api("o/r", env, None, llmstack)
        finally:
            thread.join()


@pytest.mark.parametrize("data", ["", "5", "[]", "[[1, 2]]", '"x"', "{", "[" * 200_000, b"\xff", b"{}\0"],
                         ids=range(9))
def test_what_is_no_object_is_an_empty_one(data: Any) -> None:
    assert llmstack.parse_json_object(data) == {}


# ---- a GGUF that says nonsense

NONSENSE = [-1, -2 ** 31, -2 ** 63, 2 ** 63, 2 ** 64 - 1, float("nan"), float("inf"), float("-inf"), -0.5, True, 0, 1, 3,
            [float("nan")] * 4, [-1] * 4, [2 ** 62] * 4, [float("inf"), -5.0]]


def packed(value: Any) -> tuple[int, bytes]:
    """As gguf_models.value, in the widest types."""
    if isinstance(value, list):
        kind = packed(value[0])[0]
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(packed(item)[1] for item in value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, int):
        return (10, struct.pack("<Q", value)) if value >= 0 else (11, struct.pack("<q", value))
    return gguf_models.value(value)


def header(meta: dict[str, Any], tensors: list[gguf_models.Tensor]) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(meta))
    for key, value in meta.items():
        kind, raw = packed(value)
        head += gguf_models.value(key)[1] + struct.pack("<I", kind) + raw
    for name, shape, tensor_kind in tensors:
        head += gguf_models.value(name)[1]
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor_kind, 0)
    return head


def reckon(data: bytes) -> None:
    """Sizes are what a machine can have, or the file is refused."""
    tier = llmstack.Tier("t", "fast", ctx_size=4096)
    try:
        found = llmstack.parse_gguf_header(lambda offset, count: data[offset:offset + count])
        for offload in (False, True):
            load = llmstack.LoadOptions(flash_attn=offload, gpu_layers=99 * offload, cuda=offload)
            memory = llmstack.estimate_memory(found, 4096, load)
            parts = [*memory.parts.values(), memory.host, *memory.each]
            assert all(0 <= part <= llmstack.MAX_MODEL_BYTES for part in parts)
        fit = llmstack.fit_tier(tier, llmstack.Config(), llmstack.Machine(16.0, "", False), found,
                                "local", "f.gguf")
        assert fit.need_gb >= 0
        assert 0 <= fit.largest_ctx <= 1 << 24
    except llmstack.GgufError:
        pass


def test_nonsense_in_a_header_is_refused_or_left_out() -> None:
    meta, tensors = gguf_models.model("qwen3", vocab=300)
    meta = {**meta, "qwen3.vocab_size": 300, "qwen3.attention.sliding_window": 512,
            "qwen3.expert_used_count": 2, "qwen3.attention.shared_kv_layers": 1, "qwen3.ssm.conv_kernel": 4}
    reckon(header(meta, tensors))
    for key in meta:
        for value in NONSENSE:
            reckon(header({**meta, key: value}, tensors))
    dice = random.Random(11)
    for _ in range(500):
        changed = {key: dice.choice(NONSENSE) if dice.random() < 0.15 else value for key, value in meta.items()}
        odd = [(name, tuple(dice.choice([n, 0, 2 ** 63]) for n in shape), kind) for name, shape, kind in tensors]
        reckon(header(changed, dice.choice([tensors, odd])))


def test_a_negative_vocabulary_takes_no_memory_away() -> None:
    meta, tensors = gguf_models.model("qwen3", vocab=300)
    data = header({**meta, "qwen3.vocab_size": -2 ** 40}, tensors)
    found = llmstack.parse_gguf_header(lambda offset, count: data[offset:offset + count])
    assert llmstack.estimate_memory(found, 4096, llmstack.LoadOptions()).compute > 0


def test_a_list_that_says_it_has_no_end_is_refused() -> None:
    meta = {"general.architecture": "qwen3"}
    data = header(meta, [])
    data = data.replace(struct.pack("<QQ", 0, 1), struct.pack("<QQ", 0, 2), 1)
    data += gguf_models.value("tokenizer.ggml.tokens")[1] + struct.pack("<IIQ", 9, 4, 2 ** 63)
    with pytest.raises(llmstack.GgufError, match="beyond any reason"):
        llmstack.parse_gguf_header(lambda offset, count: data[offset:offset + count])
