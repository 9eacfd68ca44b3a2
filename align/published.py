"""What is published of models and GPUs: sizes and speeds, for a plan that has neither at hand."""

from dataclasses import dataclass


def _llama2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


# Llama 2 (Touvron et al. 2023, table 1 and section 2.2): the parts of config.json that decide
# sizes, as its repositories on the Hugging Face hub have them. Base and chat models are the same.
CONFIGS: dict[str, dict[str, object]] = {
    f"meta-llama/Llama-2-{size}{kind}-hf": config
    for kind in ("", "-chat")
    for size, config in {
        "7b": _llama2(4096, 11008, 32, 32, 32),
        "13b": _llama2(5120, 13824, 40, 40, 40),
        "70b": _llama2(8192, 28672, 80, 64, 8),
    }.items()
}


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its vendor describes it.

    Attributes:
        memory: bytes, as sold: 80 GB are 80e9.
        flops: operations per second in bfloat16 or float16, dense, accumulated in float32.
        float32: operations per second in float32, without tensor cores.
        bandwidth: bytes per second between the GPU and its memory.
        link: bytes per second that it sends to others of its machine, and receives: half of what
            data sheets give for NVLink, or for PCIe where NVLink does not join eight cards.
        host: the same to main memory, by PCIe.
        network: the same of the network adapter that each GPU has for itself.
    """

    memory: int
    flops: float
    float32: float
    bandwidth: float
    link: float
    host: float
    network: float


GPUS_PER_MACHINE = 8

# NVIDIA's data sheets (A100, H100 and H200 in their SXM form) and architecture white papers. PCIe
# with 16 lanes: generation 4 64 GB/s, 5 128 GB/s, both ways together. Network: InfiniBand of a DGX
# A100 (200 Gb/s a GPU, HDR) and of a DGX H100 and H200 (400 Gb/s, NDR). Cards without NVLink are
# given that of the first: PCIe is slower than eight of them.
_PCIE4, _PCIE5 = 32e9, 64e9
_HDR, _NDR = 25e9, 50e9
CARDS: dict[str, Card] = {
    "a100-40g": Card(40 * 10**9, 312e12, 19.5e12, 1555e9, 300e9, _PCIE4, _HDR),
    "a100-80g": Card(80 * 10**9, 312e12, 19.5e12, 2039e9, 300e9, _PCIE4, _HDR),
    "h100-80g": Card(80 * 10**9, 989.5e12, 67e12, 3350e9, 450e9, _PCIE5, _NDR),
    "h200-141g": Card(141 * 10**9, 989.5e12, 67e12, 4800e9, 450e9, _PCIE5, _NDR),
    "l4-24g": Card(24 * 10**9, 121e12, 30.3e12, 300e9, _PCIE4, _PCIE4, _HDR),
    "l40s-48g": Card(48 * 10**9, 362e12, 91.6e12, 864e9, _PCIE4, _PCIE4, _HDR),
    "rtx3090-24g": Card(24 * 10**9, 71e12, 35.6e12, 936e9, _PCIE4, _PCIE4, _HDR),
    "rtx4090-24g": Card(24 * 10**9, 165.2e12, 82.6e12, 1008e9, _PCIE4, _PCIE4, _HDR),
}
