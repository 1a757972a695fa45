"""A tiny llama model whose output is noise, for tests that need a real llama-server and no real answers.

One layer, two attention heads, a residual stream of 64 values, of which four are not random: 0 is the
constant 1, so column 0 of output.weight is a logit bias; 1 is the countdown; 2 is +1 on words and on BOS,
-1 on all else; 3 is +1 on BOS only. Head 0 looks at BOS and the words so far, all alike, and reads 1 from
BOS, 0 from a word: its 1 / (1 + words) is the countdown. Prompts do not disturb it, for the tokenizer reads
them letter by letter. Head 1 is random, and makes the noise depend on the prompt.
"""

from __future__ import annotations

import random
import struct
from typing import Any, NamedTuple

from tests import gguf_models

_EMBD = _HEAD_DIM = 64  # q8_0 KV needs a multiple of 32; CUDA's flash attention has no 32 (fattn.cu)
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # enum llama_token_type, llama.h
_ROPE_BASE = 1e9  # turns the slowest pair by 2e-4 rad in 131,072 tokens: head 0 sees no distance
_FOCUS = 14.0     # 14 * 14 / sqrt(64) = 24.5: exp(-2 * 24.5) hides any number of letters from head 0
_FOLLOW = 8.0     # logit: exp(2 * 8) to 1 against a doubled or a missing space
_STOP = 900.0     # logit * words: a text stops after some 80 to 120 words
_REPEAT = 0.15    # logit per random value: 60 * 0.15 = 9 against the same word twice
_NOISE_WORDS = """static hiss hum murmur drift grain rustle echo ripple whisper patter crackle flutter shimmer buzz
    rumble wind rain surf dust snow haze foam signal wave pulse tone and the under over through between soft
    low far slow pale thin dim long falls turns moves fades comes goes rises settles"""
_NOISE_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Functions, to call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": \
{{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class _NoiseToken(NamedTuple):
    """A vocabulary entry. bias: logit, by default never; follow: logit added after a word, else taken off."""

    text: str
    bias: float = -99.0
    follow: float = 0.0
    kind: int = _NORMAL
    stop: bool = False  # held back by the countdown
    word: str = ""


def _noise_vocabulary() -> list[_NoiseToken]:
    """Return the tokens: BOS is 1, EOS 2. None has two letters, so no prompt's letters merge into words."""
    tokens = [_NoiseToken("<unk>", kind=_UNKNOWN), _NoiseToken("<s>", kind=_CONTROL),
              _NoiseToken("<|im_end|>", 24.0, -_FOLLOW, _CONTROL, stop=True)]
    controls = "im_start", "fim_prefix", "fim_suffix", "fim_middle"
    tokens += [_NoiseToken(f"<|{name}|>", kind=_CONTROL) for name in controls]
    tokens += [_NoiseToken(f"<0x{byte:02X}>", kind=_BYTE) for byte in range(256)]
    # A grammar can forbid EOS; exp(10) to 1 behind it waits what opens a forced call or closes a JSON string.
    stops = {".": (12.0, _FOLLOW), "<tool_call>": (14.0, -_FOLLOW), '"': (13.0, -_FOLLOW),
             "}": (0.0, -_FOLLOW), "]": (0.0, -_FOLLOW)}
    tokens += [_NoiseToken(text, *logits, stop=True) for text, logits in stops.items()]
    tokens += [_NoiseToken(char, -20.0) for char in ["\u2581", *map(chr, range(33, 127))] if char not in stops]
    for word in _NOISE_WORDS.split():
        title = word.capitalize()
        tokens.append(_NoiseToken(title, 0.0, -_FOLLOW, word=word))
        for text, bias in ((f"\u2581{word}", 0.0), (f",\u2581{word}", -2.5), (f".\u2581{title}", -2.5)):
            tokens.append(_NoiseToken(text, bias, _FOLLOW, word=word))
    return tokens


def _signs(rng: random.Random, count: int, scale: float) -> list[float]:
    """Return *count* times +scale or -scale."""
    return [scale if rng.random() < 0.5 else -scale for _ in range(count)]


def _vocabulary_weights(tokens: list[_NoiseToken], rng: random.Random) -> dict[str, list[float]]:
    """Return embedding and output. An embedding is all signs: its RMS is 1, and RMS norm leaves it alone."""
    embd: list[float] = []
    output: list[float] = []
    traits: dict[str, list[float]] = {}
    for index, token in enumerate(tokens):
        trait = traits.setdefault(token.word or token.text, _signs(rng, _EMBD - 4, 1.0))
        likes = [like - _REPEAT * own for like, own in zip(_signs(rng, _EMBD - 4, 0.2), trait)]
        embd += [1.0, 0.0, 1.0 if token.word or index == 1 else -1.0, 1.0 if index == 1 else -1.0, *trait]
        output += [token.bias, -_STOP * token.stop, token.follow, 0.0]
        output += likes if token.word else [0.0] * len(likes)
    return {"token_embd": embd, "output": output}


def _attention_weights(rng: random.Random) -> dict[str, list[float]]:
    """Return the projections, head 0 (counting) before head 1 (random)."""
    def stack(row: int, cells: dict[int, float], scale: float) -> list[float]:
        counting = [cells.get(at - row * _EMBD, 0.0) for at in range(_HEAD_DIM * _EMBD)]
        return counting + _signs(rng, _HEAD_DIM * _EMBD, scale)

    slow = _HEAD_DIM - 2  # the pair RoPE turns least
    mixed: list[float] = []
    for row in range(_EMBD):
        mixed += [float(row == 1), *[0.0] * (_HEAD_DIM - 1)]
        mixed += _signs(rng, _HEAD_DIM, 0.0 if row < 4 else 0.125)
    return {"blk.0.attn_q": stack(slow, {0: _FOCUS}, 0.25), "blk.0.attn_k": stack(slow, {2: _FOCUS}, 0.25),
            "blk.0.attn_v": stack(0, {0: 0.5, 3: 0.5}, 0.125), "blk.0.attn_output": mixed}


def _noise_tensors(tokens: list[_NoiseToken], seed: int, ff: int) -> dict[str, tuple[list[int], bytes]]:
    """Return name -> (shape, F32 bytes). The feed-forward is zero: *ff* only costs time and space."""
    rng = random.Random(seed)
    matrices = {**_vocabulary_weights(tokens, rng), **_attention_weights(rng)}
    packed = {name: struct.pack(f"<{len(values)}f", *values) for name, values in matrices.items()}
    ffn = "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"
    packed.update(dict.fromkeys(ffn, bytes(4 * ff * _EMBD)))
    tensors: dict[str, tuple[list[int], bytes]] = {}
    for name, raw in packed.items():
        row = {"blk.0.attn_output": 2 * _HEAD_DIM, "blk.0.ffn_down": ff}.get(name, _EMBD)
        tensors[name] = [row, len(raw) // 4 // row], raw
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[name] = [_EMBD], struct.pack("<f", 1.0) * _EMBD
    return tensors


def _noise_metadata(tokens: list[_NoiseToken], ctx_train: int, ff: int) -> dict[str, Any]:
    """Return the GGUF keys llama.cpp needs for architecture llama with a SentencePiece vocabulary."""
    ids = {token.text: index for index, token in enumerate(tokens)}
    fim = {f"tokenizer.ggml.fim_{name[:3]}_token_id": ids[f"<|fim_{name}|>"]
           for name in ("prefix", "suffix", "middle")}
    return {
        "general.architecture": "llama", "general.name": "noise", "general.file_type": 0,
        "llama.context_length": ctx_train, "llama.embedding_length": _EMBD, "llama.block_count": 1,
        "llama.feed_forward_length": ff, "llama.attention.head_count": 2,
        "llama.attention.key_length": _HEAD_DIM, "llama.attention.value_length": _HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": _HEAD_DIM, "llama.rope.freq_base": _ROPE_BASE,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [token.text for token in tokens],
        "tokenizer.ggml.token_type": [token.kind for token in tokens],
        "tokenizer.ggml.scores": [0.0] * len(tokens), "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": False, **fim,
        "tokenizer.chat_template": _NOISE_TEMPLATE}


def render_noise_gguf(seed: int = 0, ctx_train: int = 131072, pad_mb: int = 0) -> bytes:
    """Return a GGUF file: chat, tools, FIM; its texts end by themselves after about a hundred words.

    Units: ctx_train tokens; pad_mb MB of weights that do nothing, for a slow load and slow tokens. The same
    arguments give the same bytes on every Python. A prompt takes one token per ASCII character.
    """
    tokens, ff = _noise_vocabulary(), max(32, pad_mb * 1_000_000 // (3 * 4 * _EMBD) // 32 * 32)
    tensors, metadata = _noise_tensors(tokens, seed, ff), _noise_metadata(tokens, ctx_train, ff)
    shapes = [(f"{name}.weight", tuple(shape), gguf_models.F32) for name, (shape, _) in tensors.items()]
    head, _ = gguf_models.header_bytes(metadata, shapes)
    return b"".join([head, *(raw for _, raw in tensors.values())])
