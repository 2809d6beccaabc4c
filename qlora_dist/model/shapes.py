"""The public shapes behind `synthetic:NAME`, as the models' own config.json files give them."""

from typing import Any

_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _shape(
    family: str, hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, vocab_size: int,
    positions: int, rope: dict[str, Any], eps: float = 1e-5, tied: bool = False, **extra: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "rope_parameters": rope,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **extra,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _shape("Llama", 4096, 14336, 32, 32, 8, 128256, 131072, _LLAMA3_ROPE),
    "llama-3.1-70b": _shape("Llama", 8192, 28672, 80, 64, 8, 128256, 131072, _LLAMA3_ROPE),
    "llama-3.2-1b": _shape(
        "Llama", 2048, 8192, 16, 32, 8, 128256, 131072, _LLAMA3_ROPE | {"factor": 32.0}, tied=True, head_dim=64
    ),
    "llama-2-7b": _shape("Llama", 4096, 11008, 32, 32, 32, 32000, 4096, _rope(1e4)),
    "llama-2-13b": _shape("Llama", 5120, 13824, 40, 40, 40, 32000, 4096, _rope(1e4)),
    "llama-2-70b": _shape("Llama", 8192, 28672, 80, 64, 8, 32000, 4096, _rope(1e4)),
    "mistral-7b": _shape("Mistral", 4096, 14336, 32, 32, 8, 32768, 32768, _rope(1e6), sliding_window=None),
    "qwen3-8b": _shape("Qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, _rope(1e6), eps=1e-6, head_dim=128),
    "qwen2.5-32b": _shape("Qwen2", 5120, 27648, 64, 40, 8, 152064, 131072, _rope(1e6), eps=1e-6),
    "smollm2-135m": _shape("Llama", 576, 1536, 30, 9, 3, 49152, 8192, _rope(1e5), tied=True),
    "llama-tiny": _shape("Llama", 64, 128, 2, 4, 2, 320, 2048, _rope(1e4)),
    "llama-tiny-tied": _shape("Llama", 64, 128, 2, 4, 2, 320, 2048, _rope(1e4), tied=True),
    "mistral-tiny": _shape("Mistral", 64, 128, 2, 4, 2, 320, 2048, _rope(1e4), sliding_window=None),
    "qwen2-tiny": _shape("Qwen2", 64, 128, 2, 4, 2, 320, 2048, _rope(1e4)),
    "qwen3-tiny": _shape("Qwen3", 64, 128, 2, 4, 2, 320, 2048, _rope(1e4), head_dim=16),
}
