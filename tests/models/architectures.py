"""Every architecture of transformers' causal LMs, tiny: trains a step, exports and reloads to equal logits, or is refused.

``python -m tests.models.architectures`` writes the table of ``docs/architectures.md``.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ows_lightning.errors import UsageError
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import load_config, load_model
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks
from ows_lightning.sampling.outliers import layer_outlier_ratios
from tests.data.samples import tiny_tokenizer

LAYERS = 2
# What a config gets where it has such a key.
_TINY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "intermediate_size": 64,
    "ffn_dim": 64, "n_inner": 64,
    "num_hidden_layers": LAYERS, "n_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS,
    "num_attention_heads": 4, "n_heads": 4, "n_head": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "decoder_ffn_dim": 64, "dff": 64,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16, "moe_topk": 2, "intermediate_size_mlp": 64, "expert_hidden_size": 16,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "word_embed_proj_dim": 32, "rotary_dim": 4, "state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "num_heads": 4, "lru_width": 32, "sliding_window": 32, "attention_window_size": 32, "use_mamba_kernels": False,
    "unpadded_vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "global_head_dim": 8, "num_kv_shared_layers": 0, "n_shared_experts": 1, "encoder_hash_byte_group_vocab": 64,
    "hidden_size_global": 32, "depth": 1, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16, "linear_num_heads": 4, "linear_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "is_decoder": True, "use_cache": False,
    "is_encoder_decoder": False,
}  # fmt: skip
# What a type needs besides, or instead; None leaves a key of _TINY out.
_SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "phi4_multimodal": {"audio_config": {"num_blocks": 2, "nemo_conv_channels": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hidden_act": "gelu"},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "kolibri1_1": {"head_dim": 16, "index_num_heads": 1},
    "longcat_flash": {"head_dim": 8},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "feed_forward_size": 64,
        "attention_head_size": 8,
        "num_buckets": 4,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
_LARGEST = 20_000_000  # weights of what still counts as tiny


def tiny_config(kind: str) -> PretrainedConfig:
    """Returns a config of two small blocks for a model type, whose parts (text, images, sound) are as small."""
    return _tiny(CONFIG_MAPPING[kind], _SPECIAL.get(kind, {}))


def _tiny(kind: type[PretrainedConfig], special: dict[str, Any]) -> PretrainedConfig:
    usual = vars(kind(**{key: value for key, value in special.items() if key == "text_config"}))
    known = set(inspect.signature(kind.__init__).parameters) | set(usual) | set(getattr(kind, "attribute_map", {}))
    if "kv_lora_rank" in known:
        known.discard("head_dim")  # it is the sum of two others
    values = {key: value for key, value in _TINY.items() if key in known}
    if "kv_lora_rank" in known:
        values["num_key_value_heads"] = values["num_attention_heads"]
    parts = {key: type(value) for key, value in usual.items() if isinstance(value, PretrainedConfig)}
    values |= special | {key: _tiny(part, special.get(key, {})).to_dict() for key, part in parts.items()}
    return kind(**{key: value for key, value in values.items() if value is not None})


def model_types() -> list[str]:
    """Returns the model types of transformers' causal LMs."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """Returns the model of a small config, with random weights."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size / 1e6:,.0f} million weights at least")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def try_out(kind: str, folder: Path) -> tuple[str, str]:
    """Trains, exports and reloads a tiny model of a type.

    Returns:
        ``trains``, ``refused`` or, if transformers makes no small model of it, ``not tried``; and a reason.
    """
    start = folder / "start"
    try:
        config = tiny_config(kind)
        config.save_pretrained(start)
        (start / "model.safetensors").touch()
        load_config(str(start))
        try:
            model = tiny_model(config)
        except ImportError:
            load_model(str(start))
        except Exception as error:
            return "not tried", f"{type(error).__name__}: {error}"
        _train_and_export(model, folder)
    except UsageError as error:
        return "refused", " ".join(str(error).replace(str(start), "MODEL").split())
    return "trains", ""


def _train_and_export(random: PreTrainedModel, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    random.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    causal_lm = CausalLM(load_model(str(folder / "start")))
    ids = torch.arange(3, 27).view(2, 12)
    causal_lm.check_logits(ids)
    layers = decoder_layers(causal_lm)
    assert len(layers) >= LAYERS
    ratios = layer_outlier_ratios(causal_lm, [{"input_ids": ids}], threshold=2.0)
    assert ratios.isfinite().all()

    optimizer = GaLoreAdamW(galore_param_groups(causal_lm, rank=4, update_proj_gap=2), lr=1e-2)
    last = len(layers) - 1
    norm = set(non_block_parameters(causal_lm)["norm"])
    outside = [p for group in non_block_parameters(causal_lm).values() for p in group]
    activate_blocks(layers, [last], [(p, p in norm) for p in outside], [optimizer])
    before = {name: p.detach().clone() for name, p in causal_lm.named_parameters()}
    causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, p in causal_lm.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in causal_lm.named_parameters() if p.requires_grad}
    assert changed <= trainable, f"frozen weights moved: {sorted(changed - trainable)[:3]}"
    assert changed & {name for name, p in causal_lm.named_parameters() if any(p is q for q in layers[last].parameters())}

    save_huggingface(causal_lm.model, tokenizer, folder / "export")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32).eval()
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (causal_lm.eval().language_model, reloaded))
    assert torch.equal(one, other), f"the export's logits differ by {(one - other).abs().max()}"


PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_TEXT = """# Architectures

Any decoder-only model of transformers works if its decoder blocks are in a list and its LM head makes the logits from the last
hidden states. Of several stacks of blocks (BLT's, HRM's) the largest is sampled, and the others stay frozen. For each
model type of transformers {version} a model of two small blocks was scored, trained for a step with one block frozen,
exported, and reloaded; its logits had to be equal bit for bit.
`python -m tests.models.architectures` makes this page; a test checks each line.

## Trained, {trained} types

{names}

## Refused before anything trains, {refused} types

| model types (KIND) | what the user reads after `model.model_name_or_path: `; MODEL is its path, CLASS its class |
|---|---|
{reasons}
"""


def page() -> str:
    """Tries out every type, and returns the text of the documentation's page."""
    outcomes = {}
    for kind in model_types():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[kind] = try_out(kind, Path(folder))
    trained = [kind for kind, (outcome, _) in outcomes.items() if outcome == "trains"]
    refused: dict[str, list[str]] = {}
    for kind, (outcome, reason) in outcomes.items():
        if outcome == "refused":
            refused.setdefault(generalised(kind, reason), []).append(kind)
    return _TEXT.format(
        version=transformers.__version__,
        trained=len(trained),
        names=names(trained),
        refused=sum(map(len, refused.values())),
        reasons="\n".join(f"| {names(kinds)} | {reason} |" for reason, kinds in refused.items()),
    )


def names(kinds: Iterable[str]) -> str:
    """Lists model types for the page."""
    return ", ".join(f"`{kind}`" for kind in kinds)


def generalised(kind: str, reason: str) -> str:
    """A reason as the page has it: without the key, and with CLASS and KIND for what differs by model type."""
    reason = re.sub(r"\b\w+(ForCausalLM|LMHeadModel)\b", "CLASS", reason.removeprefix("model.model_name_or_path: "))
    return re.sub(rf"\b{re.escape(kind)}(?=_text_model\b|\))", "KIND", reason)


if __name__ == "__main__":
    PAGE.write_text(page())
