"""What training speed is compared with: a plain decoder as people write it today, and Hugging Face's Llama."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.sizing import Size


class PlainBlock(nn.Module):
    """RMSNorm, rotary attention by PyTorch's own function, SwiGLU; queries, keys, values in one matrix."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat([z[0] * cos - z[1] * sin, z[0] * sin + z[1] * cos], dim=-1).to(v.dtype)
                for z in (q.chunk(2, dim=-1), k.chunk(2, dim=-1)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainDecoder(nn.Module):
    """A Llama-like decoder in one file's worth of PyTorch: the speed to be level with. Nothing of the zoo is in it."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size, vocab_size: int, seq_len: int):
        super().__init__()
        hidden = -(-8 * size.dim // (3 * 64)) * 64  # 8/3 of the width, up to a multiple of 64
        self.embedding = nn.Embedding(vocab_size, size.dim)
        self.blocks = nn.ModuleList(PlainBlock(size.dim, size.heads, hidden) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.dim), nn.Linear(size.dim, vocab_size, bias=False)
        half = size.dim // size.heads // 2
        phase = torch.arange(seq_len)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", phase.cos(), persistent=False)
        self.register_buffer("sin", phase.sin(), persistent=False)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats of targets [B, T] after tokens [B, T]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


UNMASKED = "sdpa_unmasked"  # PyTorch's attention told that it is causal


class HuggingFaceLlama(nn.Module):
    """transformers' LlamaForCausalLM with fresh weights at a size of the zoo, its attention by PyTorch.

    Compiled, transformers looks for packed documents in every batch and gives PyTorch a mask, with which there is no
    FlashAttention. There are none here, so it gets no mask, by the interface that it has for that.
    """

    def __init__(self, size: Size, vocab_size: int, seq_len: int):
        from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        super().__init__()
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=size.dim, intermediate_size=-(-8 * size.dim // (3 * 64)) * 64,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=seq_len,
            attn_implementation=UNMASKED, use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats of targets [B, T] after tokens [B, T]."""
        return F.cross_entropy(self.model(tokens).logits.flatten(0, 1).float(), targets.flatten())


def decoder_flops(model: nn.Module, size: Size, seq_len: int) -> int:
    """Forward FLOPs of one sequence: its matrices, and causal attention's two products."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    return 2 * seq_len * matrices + 2 * size.layers * size.dim * seq_len * (seq_len + 1)


PEERS: dict[str, type[PlainDecoder] | type[HuggingFaceLlama]] = {"plain-decoder": PlainDecoder,
                                                                 "hf-llama": HuggingFaceLlama}
"""`impl` in the tables -> the model; each has a constructor (size, vocab_size, seq_len) and `loss(tokens, targets)`."""


def missing(impl: str) -> str | None:
    """Why a peer cannot be measured here, None if it can."""
    if impl != "hf-llama":
        return None
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        from transformers import AttentionMaskInterface, LlamaForCausalLM  # noqa: F401
    except ImportError as error:
        return f"this transformers has not all that is asked of it: {' '.join(str(error).split())[:100]}"
    return None
