"""What is known of the architectures that people convert, one row per family, and what a recipe changes of it.

Most of a family follows from the names of its modules alone, by the rules of `roles`, `fused` and `experts`. A row
holds the rest: how fused experts are stored, which heads exist without a tensor, which weights are stored transposed,
and what is unusual. An unknown architecture has no row; then the rules of names are all there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models."""

    family: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json, at any level."""
    layouts: tuple[str, ...] = ()
    """Layouts in which its fused expert stacks are published; see `experts`."""
    heads: tuple[str, ...] = ()
    """Heads beside `lm_head` that exist at run time although no tensor may."""
    transposed: frozenset[str] = frozenset()
    """Leaves whose weight is stored `[in, out]`."""
    renamed: tuple[tuple[str, str], ...] = ()
    """`(in the checkpoint, in memory)`: ends of names that a loader changes, of modules that stay dense."""
    notes: tuple[str, ...] = ()
    """What is unusual, for people."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MTP_NOTE: Final = "layers past `num_hidden_layers` are for multi-token prediction and stay as they are"

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    Architecture(
        family="Llama and its like",
        model_types=_words(
            "llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma3n_text olmo olmo2 olmo3"
            " granite cohere cohere2 starcoder2 stablelm smollm3 seed_oss exaone4 helium nemotron internlm2 internlm3"
            " ernie4_5 hunyuan_v1_dense glm glm4 baichuan yi aquila deepseek minicpm arcee apertus lfm2"
        ),
    ),
    Architecture(family="Phi", model_types=_words("phi phi3 phi4 phi4mm phi4_multimodal")),
    Architecture(
        family="vision-language",
        model_types=_words(
            "qwen2_vl qwen2_5_vl qwen3_vl qwen2_vl_text qwen2_5_vl_text qwen3_vl_text llava llava_next llava_onevision"
            " mistral3 pixtral gemma3 gemma3n paligemma mllama mllama_text_model internvl idefics3 smolvlm smolvlm2"
            " aya_vision cohere2_vision glm4v glm4v_text ovis2 kimi_vl qwen2_5_omni qwen2_audio voxtral granite_speech"
        ),
        notes=("towers and projectors of images and sound stay as they are",),
    ),
    Architecture(
        family="Qwen3-VL-MoE",
        model_types=_words("qwen3_vl_moe qwen3_vl_moe_text"),
        layouts=("rows", "columns"),
        notes=("published with transposed expert stacks, saved by transformers 5 with stacked rows: shapes tell",),
    ),
    Architecture(
        family="mixture of experts, gate_proj and up_proj",
        model_types=_words(
            "qwen2_moe qwen3_moe olmoe ernie4_5_moe flex_olmo hunyuan_v1_moe dots1 bailing_moe bailing_moe_v2"
            " glm4v_moe glm4v_moe_text qwen3_omni_moe qwen3_omni_moe_thinker ernie4_5_vl_moe ernie4_5_vl_moe_text"
            " longcat_flash afmoe lfm2_moe"
        ),
        layouts=("rows",),
    ),
    Architecture(
        family="DeepSeek, Kimi K2 and GLM-4.x",
        model_types=_words(
            "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 kimi_k2 kimi_k25 glm4_moe glm4_moe_lite glm_moe_dsa"
            " step3p5 mimo mimo_v2_flash"
        ),
        layouts=("rows",),
        notes=(_MTP_NOTE, "q_a_proj and kv_a_proj_with_mqa share a global scale: engines fuse them"),
    ),
    Architecture(
        family="Qwen3-Next and Qwen3.5",
        model_types=_words("qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text"),
        layouts=("rows",),
        notes=("linear attention: in_proj_ba and conv1d stay as they are; `mtp.*` too",),
    ),
    Architecture(
        family="Kimi Linear",
        model_types=("kimi_linear",),
        layouts=("rows",),
        notes=("q, k, v, b, f_a and g_a of a KDA layer are one row at run time",),
    ),
    Architecture(
        family="mixture of experts, w1, w2 and w3",
        model_types=_words("mixtral phimoe minimax minimax_m2 jamba dbrx grok-1"),
        layouts=("rows",),
        renamed=((".block_sparse_moe.gate", ".mlp.router"),),
        notes=("engines ask for the experts as gate_proj, down_proj and up_proj; both spellings are written",),
    ),
    Architecture(
        family="gpt-oss",
        model_types=("gpt_oss",),
        layouts=("interleaved",),
        notes=("gate and up alternate in transposed expert stacks, biases likewise",),
    ),
    Architecture(family="Llama 4", model_types=_words("llama4 llama4_text"), layouts=("columns",)),
    Architecture(
        family="Granite MoE",
        model_types=_words("granitemoe granitemoeshared granitemoehybrid jetmoe"),
        layouts=("rows",),
        notes=("input_linear and output_linear become experts.N.w1, w3 and w2, as engines call them",),
    ),
    Architecture(
        family="Nemotron-H",
        model_types=_words("nemotron_h nemotron_h_moe"),
        layouts=("rows",),
        notes=("experts have no gate: up_proj stands alone",),
    ),
    Architecture(family="Mamba", model_types=_words("mamba mamba2 falcon_mamba bamba zamba2 falcon_h1 plamo2")),
    Architecture(family="Whisper", model_types=("whisper",), heads=("proj_out",)),
    Architecture(
        family="BERT and its like",
        model_types=_words("bert xlm-roberta roberta camembert distilbert albert electra mpnet deberta-v2 modernbert"),
        heads=_words(
            "cls.predictions.decoder lm_head.decoder vocab_projector predictions.decoder generator_lm_head decoder"
        ),
    ),
    Architecture(
        family="encoder and decoder", model_types=_words("t5 mt5 umt5 bart mbart m2m_100 marian pegasus nllb-moe")
    ),
    Architecture(
        family="GPT-2",
        model_types=_words("gpt2 openai-gpt imagegpt decision_transformer"),
        transposed=frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
        notes=("weights are stored [in, out], and engines transpose them on load: they are refused",),
    ),
)
"""Families by what sets them apart."""

_BY_TYPE: Final[dict[str, Architecture]] = {}
for _row in ARCHITECTURES:
    for _model in _row.model_types:
        _BY_TYPE[_model] = _row

TIED_HEAD: Final = "lm_head"
"""The head that every family may have without a tensor; always named in the written `ignore`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What a recipe changes of the table.

    >>> Overrides().is_empty
    True
    """

    roles_off: tuple[str, ...] = ()
    """Names of roles whose modules are quantized like others."""
    roles_add: tuple[str, ...] = ()
    """Patterns of modules that stay as they are unless a target names them."""
    fused_add: tuple[tuple[str, ...], ...] = ()
    """Leaf names below one parent that one runtime layer merges."""
    fused_off: tuple[tuple[str, ...], ...] = ()
    """Rows of the table of fused sets that do not hold."""
    heads: tuple[str, ...] = ()
    """Further modules that exist at run time without a tensor, for the written `ignore`."""

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return self == NO_OVERRIDES


NO_OVERRIDES: Final = Overrides()


def families(model_types: Iterable[str]) -> tuple[Architecture, ...]:
    """Rows that know one of the model types, in the order of the types.

    >>> [row.family for row in families(["llama4", "llama4_text"])], families(["brand_new"])
    (['Llama 4'], ())
    """
    return tuple(dict.fromkeys(_BY_TYPE[model] for model in model_types if model in _BY_TYPE))


def published_layouts(model_types: Iterable[str]) -> frozenset[str]:
    """Layouts in which the expert stacks of these model types are published; empty where none is known."""
    return frozenset(layout for row in families(model_types) for layout in row.layouts)


def runtime_heads(model_types: Iterable[str], more: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of heads that engines create without a tensor on disk.

    >>> runtime_heads(["llama"]), runtime_heads(["whisper"])
    (('lm_head',), ('lm_head', 'proj_out'))
    """
    known = (head for row in families(model_types) for head in row.heads)
    return tuple(dict.fromkeys((TIED_HEAD, *known, *more)))


def transposed_leaves(model_types: Iterable[str]) -> frozenset[str]:
    """Leaves whose weight is stored `[in, out]`, such as those of GPT-2's `Conv1D`.

    >>> sorted(transposed_leaves(["gpt2"]))[:2], sorted(transposed_leaves(["gpt_bigcode"]))
    (['c_attn', 'c_fc'], [])
    """
    return frozenset(leaf for row in families(model_types) for leaf in row.transposed)


def loaded_names(modules: Iterable[str], model_types: Iterable[str]) -> set[str]:
    """Names that a loader gives dense modules of these architectures, beside those in the checkpoint.

    >>> loaded_names(["model.layers.0.block_sparse_moe.gate"], ["phimoe"])
    {'model.layers.0.mlp.router'}
    """
    ends = [pair for row in families(model_types) for pair in row.renamed]
    return {module.removesuffix(there) + here for module in modules for there, here in ends if module.endswith(there)}


def is_composite(config: Mapping[str, Any]) -> bool:
    """Whether a model is made of several, such as a tower for images and a language model: loaders rename their parts.

    >>> is_composite({"text_config": {"model_type": "llama"}}), is_composite({"rope_parameters": {}})
    (True, False)
    """
    parts = [value for value in config.values() if isinstance(value, Mapping)]
    named = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    return any("model_type" in part for part in parts) or any("hidden_size" in part for part in named)


def past_last_layer(config: Mapping[str, Any]) -> frozenset[int]:
    """Numbers of layers that come after the last one of the model, for multi-token prediction.

    >>> sorted(past_last_layer({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}))
    [61]
    """
    found: set[int] = set()
    for level in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        layers, more = level.get("num_hidden_layers"), level.get("num_nextn_predict_layers")
        if _is_count(layers) and _is_count(more):
            found.update(range(layers, layers + more))
    return frozenset(found)


_MOST_LAYERS: Final = 1000


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_LAYERS
