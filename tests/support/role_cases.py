"""For each architecture that has a role map: sizes, and which module has which role, written out by hand."""

import transformers

SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=32)
BERT_SIZES = dict(SIZES, max_position_embeddings=16)
LLAMA_SIZES = dict(
    SIZES, num_key_value_heads=1, head_dim=4, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
SEQ2SEQ_SIZES = dict(
    d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32,
)  # fmt: skip
VISION_SIZES = dict(SIZES, image_size=8, patch_size=4)
del VISION_SIZES["vocab_size"]


def layer(**roles):
    """Read role=names within one layer, `__` standing for the dot; give name -> roles."""
    found = {}
    for role, names in roles.items():
        role = role.replace("__", ".")
        for name in names.split():
            found.setdefault(name, set()).update({role, "norm"} if role.startswith("norm.") else {role})
    return found


def attention(path, names, role="attn"):
    parts = dict(zip(("q", "k", "v", "o"), names.split(), strict=True))
    return {role: path, **{f"{role}__{part}": f"{path}.{name}" for part, name in parts.items()}}


BERT_LAYER = layer(
    attn="attention", attn__q="attention.self.query", attn__k="attention.self.key", attn__v="attention.self.value",
    attn__o="attention.output.dense", mlp="output.dense", mlp__up="intermediate.dense", mlp__down="output.dense",
    norm__attn="attention.output.LayerNorm", norm__mlp="output.LayerNorm",
)  # fmt: skip
BERT_CROSS = BERT_LAYER | layer(
    cross_attn="crossattention", cross_attn__q="crossattention.self.query", cross_attn__k="crossattention.self.key",
    cross_attn__v="crossattention.self.value", cross_attn__o="crossattention.output.dense",
    norm="crossattention.output.LayerNorm",
)  # fmt: skip
BERT_OUTSIDE = layer(
    embed="embeddings.word_embeddings embeddings.position_embeddings embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
)
DISTILBERT_LAYER = layer(
    **attention("attention", "q_lin k_lin v_lin out_lin"), mlp="ffn", mlp__up="ffn.lin1", mlp__down="ffn.lin2",
    norm__attn="sa_layer_norm", norm__mlp="output_layer_norm",
)  # fmt: skip
DEBERTA_LAYER = dict(BERT_LAYER)
for old in ("query", "key", "value"):
    DEBERTA_LAYER[f"attention.self.{old}_proj"] = DEBERTA_LAYER.pop(f"attention.self.{old}")
GPT2_LAYER = layer(
    attn="attn", attn__qkv="attn.c_attn", attn__o="attn.c_proj", mlp="mlp", mlp__up="mlp.c_fc", mlp__down="mlp.c_proj",
    norm__attn="ln_1", norm__mlp="ln_2",
)  # fmt: skip
GPT2_CROSS = GPT2_LAYER | layer(
    cross_attn="crossattention", cross_attn__q="crossattention.q_attn", cross_attn__kv="crossattention.c_attn",
    cross_attn__o="crossattention.c_proj", norm="ln_cross_attn",
)  # fmt: skip
NEOX_LAYER = layer(
    attn="attention", attn__qkv="attention.query_key_value", attn__o="attention.dense", mlp="mlp",
    mlp__up="mlp.dense_h_to_4h", mlp__down="mlp.dense_4h_to_h", norm__attn="input_layernorm",
    norm__mlp="post_attention_layernorm",
)  # fmt: skip
FALCON_LAYER = layer(
    attn="self_attention", attn__qkv="self_attention.query_key_value", attn__o="self_attention.dense", mlp="mlp",
    mlp__up="mlp.dense_h_to_4h", mlp__down="mlp.dense_4h_to_h", norm__attn="input_layernorm",
)  # fmt: skip
BLOOM_LAYER = FALCON_LAYER | layer(norm__mlp="post_attention_layernorm")
OPT_LAYER = layer(
    **attention("self_attn", "q_proj k_proj v_proj out_proj"), mlp="fc2", mlp__up="fc1", mlp__down="fc2",
    norm__attn="self_attn_layer_norm", norm__mlp="final_layer_norm",
)  # fmt: skip
CROSS_LAYER = OPT_LAYER | layer(
    **attention("encoder_attn", "q_proj k_proj v_proj out_proj", "cross_attn"), norm="encoder_attn_layer_norm"
)
LLAMA_ATTENTION = attention("self_attn", "q_proj k_proj v_proj o_proj")
LLAMA_MLP = dict(mlp="mlp", mlp__up="mlp.up_proj", mlp__gate="mlp.gate_proj", mlp__down="mlp.down_proj")
LLAMA_NORMS = dict(norm__attn="input_layernorm", norm__mlp="post_attention_layernorm")
LLAMA_LAYER = layer(**LLAMA_ATTENTION, **LLAMA_MLP, **LLAMA_NORMS)
QK_NORMS = layer(norm="self_attn.q_norm self_attn.k_norm")
GEMMA2_LAYER = layer(
    **LLAMA_ATTENTION, **LLAMA_MLP, norm__attn="input_layernorm post_attention_layernorm",
    norm__mlp="pre_feedforward_layernorm post_feedforward_layernorm",
)  # fmt: skip
PHI3_LAYER = layer(
    attn="self_attn", attn__qkv="self_attn.qkv_proj", attn__o="self_attn.o_proj", mlp="mlp",
    mlp__gate_up="mlp.gate_up_proj", mlp__down="mlp.down_proj", **LLAMA_NORMS,
)  # fmt: skip
MOE_LAYER = layer(**LLAMA_ATTENTION, mlp="mlp", expert="mlp.experts", **LLAMA_NORMS)
LLAMA_OUTSIDE = layer(embed="embed_tokens", norm__final="norm")


def t5_layer(feed_forward, *, cross, gated=False):
    up = {"mlp__up": "DenseReluDense.wi_1", "mlp__gate": "DenseReluDense.wi_0"}
    inner = up if gated else {"mlp__up": "DenseReluDense.wi"}
    roles = dict(mlp="DenseReluDense", mlp__down="DenseReluDense.wo", norm__mlp="layer_norm", **inner)
    found = {f"layer.{feed_forward}.{name}": roles for name, roles in layer(**roles).items()}
    own = layer(**attention("SelfAttention", "q k v o"), norm__attn="layer_norm")
    found |= {f"layer.0.{name}": roles for name, roles in own.items()}
    if cross:
        other = layer(**attention("EncDecAttention", "q k v o", "cross_attn"), norm="layer_norm")
        found |= {f"layer.1.{name}": roles for name, roles in other.items()}
    return found


T5_SIZES = dict(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
T5_STACKS = {"encoder.block": t5_layer(1, cross=False), "decoder.block": t5_layer(2, cross=True)}
T5_OUTSIDE = layer(
    embed="shared encoder.embed_tokens decoder.embed_tokens",
    norm__final="encoder.final_layer_norm decoder.final_layer_norm",
)
GATED_STACKS = {
    "encoder.block": t5_layer(1, cross=False, gated=True),
    "decoder.block": t5_layer(2, cross=True, gated=True),
}
BART_STACKS = {"encoder.layers": OPT_LAYER, "decoder.layers": CROSS_LAYER}
BART_OUTSIDE = layer(
    embed="shared encoder.embed_tokens decoder.embed_tokens encoder.embed_positions decoder.embed_positions",
    norm="encoder.layernorm_embedding decoder.layernorm_embedding",
)
WHISPER_OUTSIDE = layer(
    embed="decoder.embed_tokens encoder.embed_positions decoder.embed_positions",
    norm__final="encoder.layer_norm decoder.layer_norm",
)
VIT_LAYER = layer(
    **attention("attention", "q_proj k_proj v_proj o_proj"), mlp="mlp", mlp__up="mlp.fc1", mlp__down="mlp.fc2",
    norm__attn="layernorm_before", norm__mlp="layernorm_after",
)  # fmt: skip
VIT_OUTSIDE = layer(embed="embeddings.patch_embeddings.projection", norm__final="layernorm")
DINO_LAYER = {
    n.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2"): r for n, r in VIT_LAYER.items()
}
CLIP_LAYER = layer(
    **attention("self_attn", "q_proj k_proj v_proj out_proj"), mlp="mlp", mlp__up="mlp.fc1", mlp__down="mlp.fc2",
    norm__attn="layer_norm1", norm__mlp="layer_norm2",
)  # fmt: skip
ALBERT_LAYER = layer(
    **attention("attention", "query key value dense"), mlp="ffn_output", mlp__up="ffn", mlp__down="ffn_output",
    norm__attn="attention.LayerNorm", norm__mlp="full_layer_layer_norm",
)  # fmt: skip
GPTJ_LAYER = layer(
    **attention("attn", "q_proj k_proj v_proj out_proj"), mlp="mlp", mlp__up="mlp.fc_in", mlp__down="mlp.fc_out",
    norm__attn="ln_1",
)  # fmt: skip
PHI_LAYER = layer(
    **attention("self_attn", "q_proj k_proj v_proj dense"), mlp="mlp", mlp__up="mlp.fc1", mlp__down="mlp.fc2",
    norm__attn="input_layernorm",
)  # fmt: skip
STARCODER_LAYER = layer(**LLAMA_ATTENTION, mlp="mlp", mlp__up="mlp.c_fc", mlp__down="mlp.c_proj", **LLAMA_NORMS)
MODERN_LAYER = layer(
    attn="attn", attn__qkv="attn.Wqkv", attn__o="attn.Wo", mlp="mlp", mlp__gate_up="mlp.Wi", mlp__down="mlp.Wo",
    norm__attn="attn_norm", norm__mlp="mlp_norm",
)  # fmt: skip
GPT2_SIZES = dict(n_embd=8, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
DISTILBERT_SIZES = dict(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=32, max_position_embeddings=16)
DISTILBERT_OUTSIDE = layer(
    embed="embeddings.word_embeddings embeddings.position_embeddings", norm="embeddings.LayerNorm"
)
WHISPER_SIZES = dict(
    SEQ2SEQ_SIZES, max_source_positions=16, max_target_positions=16, num_mel_bins=4, pad_token_id=1, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
LM = {"lm_head"}
# model type, sizes, stacks of layers, roles outside of them, and for each class: (prefix of the backbone, heads).
CASES = [
    ("bert", BERT_SIZES, {"encoder.layer": BERT_LAYER}, BERT_OUTSIDE, {
        "BertModel": ("", set()), "BertForMaskedLM": ("bert", {"cls"}), "BertForPreTraining": ("bert", {"cls"}),
        "BertForSequenceClassification": ("bert", {"classifier"}),
        "BertForQuestionAnswering": ("bert", {"qa_outputs"})}),
    ("bert", dict(BERT_SIZES, is_decoder=True, add_cross_attention=True), {"encoder.layer": BERT_CROSS}, BERT_OUTSIDE,
        {"BertLMHeadModel": ("bert", {"cls"})}),
    *((kind, BERT_SIZES, {"encoder.layer": BERT_LAYER}, BERT_OUTSIDE, {
        f"{name}Model": ("", set()), f"{name}ForMaskedLM": ("roberta", LM), f"{name}ForCausalLM": ("roberta", LM),
        f"{name}ForSequenceClassification": ("roberta", {"classifier"})})
        for kind, name in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))),
    ("electra", dict(BERT_SIZES, embedding_size=4), {"encoder.layer": BERT_LAYER}, BERT_OUTSIDE, {
        "ElectraForMaskedLM": ("electra", {"generator_predictions", "generator_lm_head"}),
        "ElectraForPreTraining": ("electra", {"discriminator_predictions"}),
        "ElectraForSequenceClassification": ("electra", {"classifier"})}),
    ("distilbert", DISTILBERT_SIZES, {"transformer.layer": DISTILBERT_LAYER}, DISTILBERT_OUTSIDE, {
        "DistilBertModel": ("", set()),
        "DistilBertForMaskedLM": ("distilbert", {"vocab_transform", "vocab_layer_norm", "vocab_projector"}),
        "DistilBertForSequenceClassification": ("distilbert", {"pre_classifier", "classifier"}),
        "DistilBertForQuestionAnswering": ("distilbert", {"qa_outputs"})}),
    ("deberta-v2", BERT_SIZES, {"encoder.layer": DEBERTA_LAYER},
        {k: v for k, v in BERT_OUTSIDE.items() if "token_type" not in k}, {
        "DebertaV2Model": ("", set()), "DebertaV2ForMaskedLM": ("deberta", {"cls"}),
        "DebertaV2ForTokenClassification": ("deberta", {"classifier"})}),
    ("albert", dict(BERT_SIZES, embedding_size=4), {"encoder.albert_layer_groups.0.albert_layers": ALBERT_LAYER},
        BERT_OUTSIDE, {"AlbertModel": ("", set()), "AlbertForMaskedLM": ("albert", {"predictions"}),
        "AlbertForSequenceClassification": ("albert", {"classifier"})}),
    ("modernbert", LLAMA_SIZES, {"layers": MODERN_LAYER},
        layer(embed="embeddings.tok_embeddings", norm="embeddings.norm", norm__final="final_norm"),
        {"ModernBertForMaskedLM": ("model", {"head", "decoder"}),
         "ModernBertForSequenceClassification": ("model", {"head", "classifier"})}),
    ("gpt2", GPT2_SIZES, {"h": GPT2_LAYER}, layer(embed="wte wpe", norm__final="ln_f"), {
        "GPT2Model": ("", set()), "GPT2LMHeadModel": ("transformer", LM),
        "GPT2DoubleHeadsModel": ("transformer", {"lm_head", "multiple_choice_head"}),
        "GPT2ForSequenceClassification": ("transformer", {"score"})}),
    ("gpt2", dict(GPT2_SIZES, add_cross_attention=True), {"h": GPT2_CROSS}, layer(embed="wte wpe", norm__final="ln_f"),
        {"GPT2LMHeadModel": ("transformer", LM)}),
    ("gptj", dict(GPT2_SIZES, rotary_dim=2), {"h": GPTJ_LAYER}, layer(embed="wte", norm__final="ln_f"),
        {"GPTJForCausalLM": ("transformer", LM)}),
    ("bloom", dict(SIZES, n_head=2, n_layer=2), {"h": BLOOM_LAYER},
        layer(embed="word_embeddings", norm="word_embeddings_layernorm", norm__final="ln_f"),
        {"BloomModel": ("", set()), "BloomForCausalLM": ("transformer", LM)}),
    ("falcon", SIZES, {"h": FALCON_LAYER}, layer(embed="word_embeddings", norm__final="ln_f"),
        {"FalconForCausalLM": ("transformer", LM), "FalconForSequenceClassification": ("transformer", {"score"})}),
    ("gpt_neox", BERT_SIZES, {"layers": NEOX_LAYER}, layer(embed="embed_in", norm__final="final_layer_norm"), {
        "GPTNeoXModel": ("", set()), "GPTNeoXForCausalLM": ("gpt_neox", LM),
        "GPTNeoXForSequenceClassification": ("gpt_neox", {"score"})}),
    ("opt", dict(BERT_SIZES, ffn_dim=16, word_embed_proj_dim=8), {"decoder.layers": OPT_LAYER},
        layer(embed="decoder.embed_tokens decoder.embed_positions", norm__final="decoder.final_layer_norm"), {
        "OPTModel": ("", set()), "OPTForCausalLM": ("model", LM),
        "OPTForSequenceClassification": ("model", {"score"})}),
    *((kind, LLAMA_SIZES, {"layers": rows}, LLAMA_OUTSIDE, {
        f"{name}Model": ("", set()), f"{name}ForCausalLM": ("model", LM),
        **({f"{name}ForSequenceClassification": ("model", {"score"})} if hasattr(
            transformers, f"{name}ForSequenceClassification") else {})})
        for kind, name, rows in (
            ("llama", "Llama", LLAMA_LAYER), ("mistral", "Mistral", LLAMA_LAYER), ("qwen2", "Qwen2", LLAMA_LAYER),
            ("gemma", "Gemma", LLAMA_LAYER), ("granite", "Granite", LLAMA_LAYER), ("smollm3", "SmolLM3", LLAMA_LAYER),
            ("ministral", "Ministral", LLAMA_LAYER), ("qwen3", "Qwen3", LLAMA_LAYER | QK_NORMS),
            ("gemma2", "Gemma2", GEMMA2_LAYER), ("phi3", "Phi3", PHI3_LAYER),
            ("starcoder2", "Starcoder2", STARCODER_LAYER), ("mixtral", "Mixtral", MOE_LAYER),
            ("qwen3_moe", "Qwen3Moe", MOE_LAYER | QK_NORMS))),
    ("gemma3_text", LLAMA_SIZES, {"layers": GEMMA2_LAYER | QK_NORMS}, LLAMA_OUTSIDE,
        {"Gemma3TextModel": ("", set()), "Gemma3ForCausalLM": ("model", LM)}),
    ("phi", {k: v for k, v in LLAMA_SIZES.items() if k != "head_dim"}, {"layers": PHI_LAYER},
        layer(embed="embed_tokens", norm__final="final_layernorm"), {"PhiForCausalLM": ("model", LM)}),
    *((kind, T5_SIZES, stacks, T5_OUTSIDE, {
        f"{name}Model": ("", set()), f"{name}ForConditionalGeneration": ("", LM),
        f"{name}ForSequenceClassification": ("transformer", {"classification_head"}),
        f"{name}ForQuestionAnswering": ("", {"qa_outputs"})})
        for kind, name, stacks in (("t5", "T5", T5_STACKS), ("mt5", "MT5", GATED_STACKS))),
    ("umt5", T5_SIZES, GATED_STACKS, T5_OUTSIDE, {"UMT5ForConditionalGeneration": ("", LM)}),
    ("bart", dict(SEQ2SEQ_SIZES, max_position_embeddings=16), BART_STACKS, BART_OUTSIDE, {
        "BartModel": ("", set()), "BartForConditionalGeneration": ("model", LM),
        "BartForSequenceClassification": ("model", {"classification_head"}),
        "BartForQuestionAnswering": ("model", {"qa_outputs"})}),
    ("mbart", dict(SEQ2SEQ_SIZES, max_position_embeddings=16), BART_STACKS,
        BART_OUTSIDE | layer(norm__final="encoder.layer_norm decoder.layer_norm"),
        {"MBartForConditionalGeneration": ("model", LM)}),
    ("pegasus", dict(SEQ2SEQ_SIZES, max_position_embeddings=16), BART_STACKS,
        {k: v for k, v in BART_OUTSIDE.items() if "layernorm" not in k}
        | layer(norm__final="encoder.layer_norm decoder.layer_norm"),
        {"PegasusForConditionalGeneration": ("model", LM)}),
    ("whisper", WHISPER_SIZES, BART_STACKS, WHISPER_OUTSIDE, {
        "WhisperModel": ("", set()), "WhisperForConditionalGeneration": ("model", {"proj_out"})}),
    ("whisper", WHISPER_SIZES, {"encoder.layers": OPT_LAYER},
        layer(embed="encoder.embed_positions", norm__final="encoder.layer_norm"),
        {"WhisperForAudioClassification": ("", {"projector", "classifier"})}),
    ("vit", VISION_SIZES, {"layers": VIT_LAYER}, VIT_OUTSIDE, {
        "ViTModel": ("", set()), "ViTForImageClassification": ("vit", {"classifier"}),
        "ViTForMaskedImageModeling": ("vit", {"decoder"})}),
    ("dinov2", VISION_SIZES, {"encoder.layer": DINO_LAYER}, VIT_OUTSIDE,
        {"Dinov2Model": ("", set()), "Dinov2ForImageClassification": ("dinov2", {"classifier"})}),
    ("clip_text_model", BERT_SIZES, {"encoder.layers": CLIP_LAYER},
        layer(embed="embeddings.token_embedding embeddings.position_embedding", norm__final="final_layer_norm"),
        {"CLIPTextModel": ("", set())}),
    ("clip_vision_model", VISION_SIZES, {"encoder.layers": CLIP_LAYER},
        layer(embed="embeddings.patch_embedding embeddings.position_embedding", norm="pre_layrnorm",
              norm__final="post_layernorm"), {"CLIPVisionModel": ("", set())}),
    ("siglip_text_model", BERT_SIZES, {"encoder.layers": CLIP_LAYER},
        layer(embed="embeddings.token_embedding embeddings.position_embedding", norm__final="final_layer_norm"),
        {"SiglipTextModel": ("", set())}),
]  # fmt: skip
