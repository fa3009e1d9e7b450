"""Which fields of a GGUF file may be there: an allow-list, since an unknown one can change what the model computes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from unipool_jax.convert import gguf_rope

_READ = {
    "general.architecture",
    "general.alignment",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.freq_base",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
}
"""Fields that `read_gguf` uses."""

_HARMLESS = re.compile(
    r"""
    general\.(name|author|version|organization|finetune|basename|description|quantized_by|size_label|url|doi|uuid
             |repo_url|tags|languages|datasets|file_type|license(\.name|\.link)?)
    | general\.(source|base_model|dataset)\.[a-z0-9_.]+       # where the model is from
    | general\.sampling\.[a-z0-9_]+                           # advice for sampling
    | quantize\.imatrix\.[a-z_]+ | mradermacher\.[a-z_.]+     # how it was quantized
    | split\.tensors\.count
    | tokenizer\.chat_template(\.[a-z0-9_]+|s)? | tokenizer\.huggingface\.json
    | tokenizer\.ggml\.scores                                 # order of merges, for other models
    | tokenizer\.ggml\.[a-z_]+_token_ids?                     # names of control tokens
    """,
    re.VERBOSE,
)
"""Fields that change nothing."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "general.quantization_version": (2,),
    "split.no": (0,),
    "split.count": (0, 1),
    "llama.use_parallel_residual": (False,),
    "llama.tensor_data_layout": ("Meta AI original pth",),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.expert_shared_count": (0,),
    "llama.expert_weights_norm": (False,),
    "llama.expert_weights_scale": (1.0,),
    "llama.leading_dense_block_count": (0,),
    "llama.nextn_predict_layers": (0,),
    "llama.pooling_type": (0,),
    "llama.swin_norm": (False,),
    "llama.logit_scale": (1.0,),
    "llama.residual_scale": (1.0,),
    "llama.embedding_scale": (1.0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.router_logit_softcapping": (0.0,),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.output_scale": (1.0,),
    "llama.rope.scale_linear": (1.0,),
    "tokenizer.ggml.add_bos_token": (False,),
    "tokenizer.ggml.add_eos_token": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
}
"""Fields of a computation that we do not have, and the values with which it does nothing."""


def key_problems(fields: Mapping[str, Any], *, head_size: int, vocab_size: int, sequence_length: int) -> list[str]:
    """One message for each field that is unknown, or has a value that changes what the model computes.

    Args:
      fields: of the file, of the `llama` architecture.
      head_size: channels of an attention head.
      vocab_size: rows of the embedding.
      sequence_length: of the run that the file becomes.
    """
    neutral = _NEUTRAL | {
        "llama.vocab_size": (vocab_size,),
        "llama.rope.dimension_count": (head_size,),
        "llama.attention.key_length": (head_size,),
        "llama.attention.value_length": (head_size,),
        "llama.attention.scale": (float(1 / math.sqrt(head_size)),),
        "llama.attention.sliding_window": (0,),
    }
    problems = list(gguf_rope.problems(fields))
    for name, value in fields.items():
        if name in _READ or name in gguf_rope.READ or _HARMLESS.fullmatch(name):
            continue
        shown = f"{name}={value if not isinstance(value, list) else f'(list of {len(value)})'}"
        if name not in neutral:
            problems.append(f"{shown}: unknown, so it may change what the model computes")
        elif not any(_same(value, other) for other in neutral[name]):
            # A window as long as any sequence hides nothing.
            if name.endswith("sliding_window") and type(value) is int and value >= sequence_length:
                continue
            problems.append(f"{shown}: not supported; the model is the same only with {neutral[name][0]}")
    return problems


def _same(value: Any, neutral: Any) -> bool:
    if isinstance(neutral, float):
        return type(value) in (int, float) and math.isclose(value, neutral, rel_tol=1e-6, abs_tol=1e-12)
    return type(value) is type(neutral) and bool(value == neutral)
