"""What decoding is compared with: the plain decoder of `train_peers` with a static cache, and Hugging Face's Llama."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.bench.timing import captured
from zoo.bench.train_peers import HuggingFaceLlama, PlainDecoder, missing
from zoo.errors import ZooError
from zoo.sizing import Size

VOCABULARY = 256


class PlainSteps(nn.Module):
    """Greedy decoding as people write it: a static cache, a mask over all of it, compiled whole, one CUDA graph."""

    k: Tensor
    v: Tensor
    ids: Tensor
    position: Tensor

    def __init__(self, size: Size, batch: int, context: int, room: int):
        super().__init__()
        self.decoder, self.context = PlainDecoder(size, VOCABULARY, room), context
        shape = size.layers, batch, size.heads, room, size.dim // size.heads
        self.register_buffer("k", torch.rand(shape))
        self.register_buffer("v", torch.rand(shape))
        self.register_buffer("ids", torch.zeros(batch, 1, dtype=torch.int64))
        self.register_buffer("position", torch.tensor([context]))

    def step(self) -> None:
        """Read `ids`, and put the likeliest next ones in their place."""
        decoder, place = self.decoder, torch.arange(self.k.shape[3], device=self.k.device)
        hidden = (place > self.position)[None, None, None]
        cos, sin = (table[self.position] for table in (decoder.cos, decoder.sin))
        x, blocks = decoder.embedding(self.ids), cast("Iterable[Any]", decoder.blocks)
        for block, k_cache, v_cache in zip(blocks, self.k, self.v, strict=True):
            q, k, v = block.qkv(block.attention_norm(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = (torch.cat([z[0] * cos - z[1] * sin, z[0] * sin + z[1] * cos], dim=-1).to(v.dtype)
                    for z in (q.chunk(2, dim=-1), k.chunk(2, dim=-1)))
            k_cache.index_copy_(2, self.position, k)
            v_cache.index_copy_(2, self.position, v)
            # PyTorch's own function gives a head's whole cache to one program: at 16k it took seven times as long
            scores = (q @ k_cache.mT).float() * q.shape[-1] ** -0.5
            y = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype) @ v_cache
            x = x + block.out(y.transpose(1, 2).flatten(-2))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, dim=-1)
            x = x + block.down(F.silu(gate) * up)
        self.ids.copy_(decoder.head(decoder.norm(x)).argmax(-1))
        self.position += 1

    def recorded(self, device: torch.device) -> Callable[[], None]:
        """One step as a call: compiled and replayed on a GPU."""
        if device.type != "cuda":
            return self.step
        step = torch.compile(self.step, dynamic=False)
        for _ in range(2):
            step()
        return captured(step, device)


class Llama:
    """`generate` with transformers' static cache, greedy; by itself it compiles the step."""

    def __init__(self, size: Size, batch: int, context: int, room: int, device: torch.device, dtype: torch.dtype):
        if reason := missing("hf-llama"):
            raise ZooError(reason)
        self.model = HuggingFaceLlama(size, VOCABULARY, room).model.to(device, dtype).eval()
        self.model.config.use_cache = self.model.generation_config.use_cache = True
        self.prompt = torch.randint(VOCABULARY, (batch, context), device=device)

    def generate(self, tokens: int) -> None:
        """The prompt read, and so many tokens more."""
        self.model.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), max_new_tokens=tokens,
                            min_new_tokens=tokens, do_sample=False, use_cache=True, cache_implementation="static",
                            pad_token_id=0)
