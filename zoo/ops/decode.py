"""Products of one token's vectors with what stands before and after them, where kernels take them together: decoding.

Everything here is for tensors [B, 1, D] of one token a row, in float32 beside weights of any float type, without
gradients, on the kernels of `zoo/kernels/decode*.py`. `takes` says whether they can; if not, callers go their usual
way, which is the reference. States are written in place, with no look at the device: room must be there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ops.backend import Kernel

FEW, MANY = 15, 4096  # rows
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether x [B, t, D] is one token a row that the kernels here take with these weights [N, D].

    Many rows with float32 weights are better off with PyTorch's products: the kernels would read a weight for each row.
    """
    dtype = weights[0].dtype
    return (x.shape[1] == 1 and 0 < len(x) <= (FEW if dtype == torch.float32 else MANY) and x.dtype == torch.float32
            and not torch.is_grad_enabled() and dtype in WEIGHTS and all(each.dtype == dtype for each in weights)
            and KERNEL.chosen(x, x.shape[-1]))


def takes_ids(ids: Tensor, table: Tensor) -> bool:
    """Whether ids [B, t] are of one token a row that `embed` takes with this embedding [V, D]."""
    return (ids.shape[1] == 1 and len(ids) > 0 and table.dtype == torch.float32 and not torch.is_grad_enabled()
            and KERNEL.chosen(table, table.shape[1]))


def embed(ids: Tensor, table: Tensor, norm: nn.LayerNorm, position: Tensor) -> Tensor:
    """ids [B, 1] -> the norm of their embeddings [B, 1, D]; position [B] advances by one, in its place."""
    from zoo.kernels.decode import embed as kernel

    return kernel(flat(ids), table, norm.weight, norm.bias, norm.eps, position).unsqueeze(1)


def norm_linear(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, weight: Tensor,
                glu: bool = False) -> tuple[Tensor, Tensor]:
    """x, y [B, 1, D] (y None: nothing to add), W [N, D] -> x + y, W norm(x + y) [B, 1, N].

    glu: W [2 N, D] makes gate and up, and silu(gate) up is what comes (SwiGLU, 2002.05202 eq. 6).
    """
    from zoo.kernels.decode import norm_linear as kernel

    summed, out = kernel(flat(x), None if y is None else flat(y), norm.weight, norm.bias, norm.eps, weight, glu)
    return summed.unsqueeze(1), out.unsqueeze(1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, 1, K], W [N, K] -> W x [B, 1, N]."""
    from zoo.kernels.decode import linear as kernel

    return kernel(flat(x), weight).unsqueeze(1)


def flat(x: Tensor) -> Tensor:
    """[B, 1, D] -> [B, D] without gaps."""
    return x.squeeze(1).contiguous()


def dense(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state in tensors without gaps, as the kernels want them; itself where it is that already."""
    return {name: value.contiguous() for name, value in state.items()}


def worst(ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> float:
    """The largest relative error of all, as a multiple of what float32 sums of products with `dtype` may have."""
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    errors = [float((ours[name].double() - exact[name].double()).norm() / exact[name].double().norm()) / allowed
              for name in exact]
    return max(error if error == error else float("inf") for error in errors)


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Weights of every dtype: x is float32 always. One row, and a tile of rows."""
    from zoo.kernels.decode import embed as embed_kernel
    from zoo.kernels.decode import linear as linear_kernel
    from zoo.kernels.decode import norm_linear as norm_kernel

    D, N = sizes[0], 83
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    for kind in (torch.float32, torch.bfloat16):
        for B in (1, 19):
            x, y = (torch.randn(B, D, generator=generator).to(device) for _ in range(2))
            gain, bias = (torch.randn(D, generator=generator).to(device) for _ in range(2))
            inner = torch.randn(2 * N, D, generator=generator).to(device, kind) / D**0.5
            outer = torch.randn(D, N, generator=generator).to(device, kind) / N**0.5
            ids, position = torch.arange(B, device=device), torch.arange(B, device=device)
            with torch.no_grad():
                e = embed_kernel(ids, x, gain, bias, 1e-5, position)
                s, h = norm_kernel(x, y, gain, bias, 1e-5, inner, True)
                out = linear_kernel(h, outer)
            gate, up = (F.layer_norm(x.double() + y.double(), (D,), gain.double(), bias.double())
                        @ inner.double().T).chunk(2, dim=-1)
            middle = F.silu(gate) * up
            exact = {"e": F.layer_norm(x.double(), (D,), gain.double(), bias.double()),
                     "position": ids + 1, "s": x.double() + y.double(), "h": middle,
                     "out": middle @ outer.double().T}
            found = max(found, worst({"e": e, "position": position, "s": s, "h": h, "out": out}, exact, kind))
    return found


KERNEL = Kernel("decode", _self_test, most=1024, dtypes=(torch.float32,), sized="widths")
