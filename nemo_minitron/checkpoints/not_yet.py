"""Models that are known by name and are not read: what is said of them."""

QWEN3_MOE = "Qwen3-MoE: not yet"
HETEROGENEOUS = (
    "layers of several shapes (Llama-Nemotron Super and Ultra, DeciLM, Puzzletron): not yet; read are models whose "
    "layers are all alike, such as Llama-3.1-Nemotron-Nano-8B, and Megatron-Bridge's AutoBridge takes this one"
)
#: NeMo 2.7's Phi3Config and its importer, Megatron Core 0.15's rotary embeddings.
PHI3 = (
    "Phi-3, Phi-4 and Phi-4-mini: not yet; Megatron Core has no LongRoPE, and NeMo 2.7's importer of Phi-3 passes over "
    "query groups, partial rotary embedding, tied embeddings and sliding window"
)
BOTH_WAYS = "an encoder, whose tokens attend both ways: not read; decoders are"
LLAMA4 = "Llama 4: not yet"
NEMOTRON_H = "Nemotron-H, a hybrid of Mamba and attention: not yet"
QWEN_VL = "Qwen-VL, a model of images and text: not yet"
