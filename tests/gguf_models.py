"""GGUF files made on the spot, of any architecture the tests need; and the dimensions of the profiles' models."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import llmstack

F32, F16 = 0, 1
Tensor = tuple[str, tuple[int, ...], int]


def value(item: Any) -> tuple[int, bytes]:
    """(GGUF type, bytes)."""
    if isinstance(item, bool):
        return 7, struct.pack("<?", item)
    if isinstance(item, int):
        return 4, struct.pack("<I", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if isinstance(item, str):
        return 8, struct.pack("<Q", len(item.encode())) + item.encode()
    kind = {4: 5}.get(value(item[0])[0], value(item[0])[0])
    if kind in (5, 6):                          # a vocabulary has a quarter of a million
        raw = struct.pack(f"<{len(item)}{'i' if kind == 5 else 'f'}", *item)
    else:
        raw = b"".join(value(x)[1] for x in item)
    return 9, struct.pack("<IQ", kind, len(item)) + raw


def header_bytes(meta: dict[str, Any], tensors: list[Tensor], version: int = 3) -> tuple[bytes, int]:
    """The header up to where tensor data begins, and how many bytes of that follow."""
    head, offset = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(meta)), 0
    for key, item in meta.items():
        kind, raw = value(item)
        head += value(key)[1] + struct.pack("<I", kind) + raw
    for name, shape, kind in tensors:
        block, size = llmstack._GGML_SIZES[kind]
        values = 1
        for length in shape:
            values *= length
        head += value(name)[1] + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += (values // block * size + 31) // 32 * 32
    return head + bytes(-len(head) % 32), offset


def write(path: Path, meta: dict[str, Any], tensors: list[Tensor]) -> Path:
    """A file whose weights are holes: zeros that take no room on the disk."""
    head, size = header_bytes(meta, tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return path


def vocabulary(count: int) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *map(chr, range(33, 127))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 94]
    more = range(len(tokens), count)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens + [f"w{i}" for i in more],
            "tokenizer.ggml.token_type": kinds + [1] * len(more), "tokenizer.ggml.scores": [0.0] * count,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


def model(arch: str, *, layers: int = 4, embd: int = 1024, heads: int = 8, kv: int | list[int] = 2, head: int = 0, ff: int = 4096,
          vocab: int = 32_000, tied: bool = False, ctx: int = 131_072, experts: int = 0, used: int = 0, expert_ff: int = 0,
          shared: int = 0, window: int = 0, inner: int = 0, state: int = 0, group: int = 1, rank: int = 0, conv: int = 4,
          lora: int = 0, rope: int = 64, extra: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata and tensors of a model that llama.cpp loads, in the names of its own hyperparameters."""
    head = head or embd // heads
    meta: dict[str, Any] = {
        "context_length": ctx, "embedding_length": embd, "block_count": layers, "feed_forward_length": ff,
        "attention.head_count": heads, "attention.head_count_kv": kv, "attention.key_length": head,
        "attention.value_length": head, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head // 4 if arch == "qwen3next" else head, "rope.freq_base": 1e6}
    if experts:
        meta.update({"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": expert_ff})
    if shared:
        meta["expert_shared_feed_forward_length"] = shared
    if window:
        meta["attention.sliding_window"] = window
    if inner:
        meta.update({"ssm.conv_kernel": conv, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank,
                     "ssm.group_count": group})
    if lora:
        meta.update({"attention.kv_lora_rank": lora, "attention.key_length": lora + rope, "attention.value_length": lora,
                     "attention.key_length_mla": head, "attention.value_length_mla": head - rope, "attention.head_count_kv": 1,
                     "rope.dimension_count": rope, "leading_dense_block_count": 1, "expert_shared_count": 1,
                     "expert_weights_scale": 1.0, "attention.q_lora_rank": embd // 2})
    meta = {"general.architecture": arch, "general.name": "x", "general.file_type": 1, **vocabulary(vocab),
            **{f"{arch}.{k}": v for k, v in {**meta, **(extra or {})}.items()}}
    tensors: list[Tensor] = []

    def add(name: str, *shape: int, kind: int = -1) -> None:
        tensors.append((name, shape, kind if kind >= 0 else F32 if len(shape) == 1 else F16))

    add("token_embd.weight", embd, vocab)
    add("token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight", embd)
    if not tied:
        add("output.weight", embd, vocab)
    for i in range(layers):
        b = f"blk.{i}."
        own_kv = kv[i] if isinstance(kv, list) else kv
        add(b + "attn_norm.weight", embd)
        if arch == "qwen3next" and (i + 1) % 4:
            keys, values = state * group, state * rank
            add(b + "attn_qkv.weight", embd, 2 * keys + values)
            add(b + "attn_gate.weight", embd, values)
            add(b + "ssm_conv1d.weight", conv, 2 * keys + values, kind=F32)
            add(b + "ssm_dt.bias", rank)
            add(b + "ssm_a", rank)
            add(b + "ssm_ba.weight", embd, 2 * rank)
            add(b + "ssm_norm.weight", state)
            add(b + "ssm_out.weight", values, embd)
        elif arch == "granitehybrid" and not own_kv:
            wide = inner + 2 * group * state
            add(b + "ssm_in.weight", embd, inner + wide + rank)
            add(b + "ssm_conv1d.weight", conv, wide, kind=F32)
            add(b + "ssm_conv1d.bias", wide)
            add(b + "ssm_dt.bias", rank)
            add(b + "ssm_a", 1, rank, kind=F32)
            add(b + "ssm_d", 1, rank, kind=F32)
            add(b + "ssm_norm.weight", inner // group, group, kind=F32)
            add(b + "ssm_out.weight", inner, embd)
        elif arch == "jamba" and not own_kv:
            add(b + "ssm_in.weight", embd, 2 * inner)
            add(b + "ssm_conv1d.weight", conv, inner, kind=F32)
            add(b + "ssm_conv1d.bias", inner)
            add(b + "ssm_x.weight", inner, rank + 2 * state)
            for name, size in (("dt", rank), ("b", state), ("c", state)):
                add(f"{b}ssm_{name}_norm.weight", size)
            add(b + "ssm_dt.weight", rank, inner)
            add(b + "ssm_dt.bias", inner)
            add(b + "ssm_a", state, inner, kind=F32)
            add(b + "ssm_d", inner)
            add(b + "ssm_out.weight", inner, embd)
        elif arch == "lfm2" and not own_kv:
            add(b + "shortconv.conv.weight", conv, embd, kind=F32)
            add(b + "shortconv.in_proj.weight", embd, 3 * embd)
            add(b + "shortconv.out_proj.weight", embd, embd)
        elif lora:
            add(b + "attn_q_a_norm.weight", embd // 2)
            add(b + "attn_kv_a_norm.weight", lora)
            add(b + "attn_q_a.weight", embd, embd // 2)
            add(b + "attn_q_b.weight", embd // 2, heads * head)
            add(b + "attn_kv_a_mqa.weight", embd, lora + rope)
            add(b + "attn_k_b.weight", head - rope, lora, heads)
            add(b + "attn_v_b.weight", lora, head - rope, heads)
            add(b + "attn_output.weight", heads * (head - rope), embd)
        else:
            add(b + "attn_q.weight", embd, heads * head * (2 if arch == "qwen3next" else 1))
            add(b + "attn_k.weight", embd, own_kv * head)
            add(b + "attn_v.weight", embd, own_kv * head)
            add(b + "attn_output.weight", heads * head, embd)
            if arch in ("qwen3", "qwen3moe", "gemma3", "qwen3next", "lfm2"):
                add(b + "attn_q_norm.weight", head)
                add(b + "attn_k_norm.weight", head)
            if arch in ("qwen2", "gpt-oss"):
                add(b + "attn_q.bias", heads * head)
                add(b + "attn_k.bias", own_kv * head)
                add(b + "attn_v.bias", own_kv * head)
            if arch == "gpt-oss":
                add(b + "attn_output.bias", embd)
                add(b + "attn_sinks.weight", heads)
        if arch in ("gemma2", "gemma3", "gpt-oss", "qwen3next"):
            add(b + "post_attention_norm.weight", embd)
        if arch in ("gemma2", "gemma3"):
            add(b + "post_ffw_norm.weight", embd)
        if arch not in ("gpt-oss", "qwen3next"):
            add(b + "ffn_norm.weight", embd)
        if experts and not (lora and i == 0):
            add(b + "ffn_gate_inp.weight", embd, experts, kind=F32)
            add(b + "ffn_gate_exps.weight", embd, expert_ff, experts)
            add(b + "ffn_up_exps.weight", embd, expert_ff, experts)
            add(b + "ffn_down_exps.weight", expert_ff, embd, experts)
            if arch == "gpt-oss":
                add(b + "ffn_gate_inp.bias", experts)
                add(b + "ffn_gate_exps.bias", expert_ff, experts, kind=F32)
                add(b + "ffn_up_exps.bias", expert_ff, experts, kind=F32)
                add(b + "ffn_down_exps.bias", embd, experts, kind=F32)
            if arch == "qwen3next":
                add(b + "ffn_gate_inp_shexp.weight", embd)
            beside = shared or (expert_ff if lora else 0)
            if beside:
                add(b + "ffn_gate_shexp.weight", embd, beside)
                add(b + "ffn_up_shexp.weight", embd, beside)
                add(b + "ffn_down_shexp.weight", beside, embd)
        else:
            add(b + "ffn_gate.weight", embd, ff)
            add(b + "ffn_up.weight", embd, ff)
            add(b + "ffn_down.weight", ff, embd)
    return meta, tensors


def _known() -> dict[str, llmstack.GgufHeader]:
    """The profiles' models by the names of their files, without what comes after the quantization."""
    models, found = llmstack.known_models(), {}
    for name, row in models.items():
        for quant in row["gb"]:
            file = f"{name}-{quant.lstrip('-')}" if quant != "-Q4_K_M" else f"{name}{quant}"
            header = llmstack.known_header(file, 0.0, models)
            assert header is not None
            found[file] = header
    return found


KNOWN = _known()


def header_of(file: str) -> llmstack.GgufHeader | None:
    """The known header of a model file, None where its architecture was not to be found out."""
    return llmstack.known_header(file, 0.0, llmstack.known_models())
