"""Choose the kernels that compute a training step on a GPU, in case the ones PyTorch chooses fail there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trce_lightning.jobs.trainers import native_dtype


@dataclass(frozen=True)
class Kernels:
    """Ways to compute a step. Those of CUDA change nothing on a CPU.

    Args:
        captured: True to replay a step as a CUDA graph, if the device is a GPU.
        half: True to compute in bfloat16 if the device has it. If False, float32 products on a GPU are TF32.
        blas: the library of matrix products that PyTorch prefers, or None for its own choice.
        attention: the kernels that attention may take on a GPU, or None for PyTorch's own choice.
        written_out: True to compute root mean square norms by their formula, without the fused kernel.
        environment: variables of CUDA's libraries.
    """

    captured: bool = True
    half: bool = True
    blas: str | None = None
    attention: tuple[SDPBackend, ...] | None = None
    written_out: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def prefer(self) -> None:
        """Set what holds for the whole process. Call this before the GPU is used."""
        os.environ.update(self.environment)
        if self.blas is not None and torch.cuda.is_available():
            torch.backends.cuda.preferred_blas_library(self.blas)
        if not self.half:
            torch.set_float32_matmul_precision("high")

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the type of the network that computes: bfloat16 if the device has it, else float32."""
        has_half = native_dtype(device.type) is torch.bfloat16
        return torch.bfloat16 if self.half and has_half else torch.float32

    def attending(self, device: torch.device) -> AbstractContextManager[None]:
        """Return the context in which the loss is computed.

        On a CPU, the backward pass of flash attention takes several times as long as that of the plain
        formula.
        """
        if device.type != "cuda":
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext() if self.attention is None else sdpa_kernel(list(self.attention))

    def apply(self, network: nn.Module) -> nn.Module:
        """Return ``network``, in which norms are written out if these kernels ask for it."""
        if self.written_out:
            for module in network.modules():
                for name, child in module.named_children():
                    if type(child) is nn.RMSNorm:
                        setattr(module, name, WrittenOutRMSNorm(child))
        return network


class WrittenOutRMSNorm(nn.Module):
    """x ↦ w · x / √(mean x² + ε), computed in float32 by elementary operations."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.dims = tuple(range(-len(norm.normalized_shape), 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of ``x``, ``[…, d]``, in its type."""
        wide = x.float()
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        wide = wide * torch.rsqrt(wide.square().mean(self.dims, keepdim=True) + eps)
        return (wide if self.weight is None else wide * self.weight.float()).to(x.dtype)


_NOT_CUDNN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_MATH = (SDPBackend.MATH,)

KERNELS: dict[str, Kernels] = {
    "default": Kernels(),
    "no-cudnn": Kernels(attention=_NOT_CUDNN),
    "written-out": Kernels(written_out=True),
    "cublaslt": Kernels(blas="cublaslt"),
    "workspace": Kernels(environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    "math": Kernels(attention=_MATH, written_out=True),
    "eager": Kernels(captured=False),
    "tf32": Kernels(half=False),
    "plain": Kernels(captured=False, half=False, blas="cublaslt", attention=_MATH, written_out=True),
    "blocking": Kernels(captured=False, environment={"CUDA_LAUNCH_BLOCKING": "1"}),
}
"""Kernels by name, the faster ones first. With ``blocking``, a traceback names the kernel that failed.

On an H200 with PyTorch 2.11, FLUX's backward pass fails in cuDNN's attention, so it needs ``no-cudnn``.
"""
