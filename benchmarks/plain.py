"""The authors' procedure, for measuring only: our own, plain implementation of what their released code does.

It is written from a description of TRCE (arXiv 2503.07389) and of its released code, at their settings:
prompts are encoded one at a time, stage 1 is accumulated layer by layer and pair by pair in float32 and
inverted for each layer, every trajectory is sampled in full under guidance, and a training iteration holds
three networks and evaluates one latent at a time. Where their code is merely wrong and the cost is the same,
this is right, so that results can be compared: end of text by token position, one η, λ as an argument,
gradients cleared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents ``[B, C, H, W]``, timestep, text states ``[B, L, d]``) → predicted noise ``[B, C, H, W]``."""


@torch.no_grad()
def end_of_text_state(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompt: str) -> Tensor:
    """The first end of text's state ``[d]`` of one padded prompt."""
    input_ids = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    ).input_ids
    states = text_encoder(torch.tensor([input_ids]))[0]
    return states[0, input_ids.index(tokenizer.eos_token_id)]


SLOTS = (0.0, 1.0, 0.0, 0.0)
"""Weights of a prompt's start of text, first end of text, last end of text, and keyword."""


@dataclass(frozen=True)
class KeptSums:
    """The sums that the authors download, over kept states: Σ W e eᵀ ``[d_out, d]`` by layer and Σ e eᵀ."""

    values: list[Tensor]
    states: Tensor


@torch.no_grad()
def edit_projections(
    projections: Sequence[nn.Linear],
    pairs: Sequence[tuple[Tensor, Tensor]],
    kept: KeptSums,
    eta: float,
    ridge: float,
    copies: bool = True,
    weights: Sequence[float] = SLOTS,
) -> list[Tensor]:
    """W' = (mean W e_s e_mᵀ + η Σ W e eᵀ + λ W)(mean e_m e_mᵀ + η Σ e eᵀ + λ I)⁻¹ for each layer.

    Args:
        copies: copy all matrices for each pair, as the released code does and as nothing needs.
        weights: of a pair's slots, all of which have its states here. The released code multiplies out and
            adds up those of weight 0 as well.
    """
    prepared = []
    for malicious, safe in pairs:
        layers = [copy.deepcopy(layer) for layer in projections] if copies else projections
        for weight in weights:
            prepared.append((weight / len(pairs), malicious, [layer(safe) for layer in layers]))
    edited = []
    for index, layer in enumerate(projections):
        left = eta * kept.values[index] + ridge * layer.weight
        right = eta * kept.states + ridge * torch.eye(kept.states.shape[0], dtype=kept.states.dtype)
        for weight, malicious, values in prepared:
            left += weight * torch.outer(values[index], malicious)
            right += weight * torch.outer(malicious, malicious)
        edited.append(left @ torch.inverse(right))
    return edited


@torch.no_grad()
def centres(empty: Tensor, generator: torch.Generator, count: int = 3, rounds: int = 20) -> Tensor:
    """The states that SPEED never moves ``[d, count + 1]``: ∅'s first, and k-means centres of its others."""
    first, others = empty[:1], empty[1:]
    found = others[torch.randperm(len(others), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(others, found).argmin(1)
        members = [others[nearest == index] for index in range(count)]
        found = torch.stack(
            [rows.mean(0) if len(rows) else old for rows, old in zip(members, found, strict=True)]
        )
    return torch.cat([first, found]).mT


@torch.no_grad()
def speed(
    weight: Tensor,
    targets: Tensor,
    anchors: Tensor,
    retain: Tensor,
    invariant: Tensor,
    generator: torch.Generator,
    *,
    threshold: float = 1e-1,
    scale: float = 0.05,
    augmented: int = 10,
) -> Tensor:
    """SPEED's W' of one matrix, in its settings for many concepts, without its filter.

    W + W (C_a − C_t) P [I − M K₂ (K₂ᵀ P M K₂)⁻¹ K₂ᵀ P] M with M = (C_t P + ρ I)⁻¹. P projects on the singular
    vectors of the retained states' second moment below ``threshold``. Each retained state counts with
    ``augmented`` copies, moved along the direction that W reads least.
    """
    c_t, c_a = targets.mT @ targets / len(targets), anchors.mT @ targets / len(targets)
    weakest = torch.linalg.svd(weight, full_matrices=False)[2][-1]
    noise = torch.randn(augmented, len(retain), 1, generator=generator, dtype=retain.dtype)
    states = torch.cat([retain, *(retain + amount * weakest for amount in noise)])
    left, singular, _ = torch.linalg.svd(states.mT @ states / len(states))
    free = left[:, singular < threshold]
    p, identity = free @ free.mT, torch.eye(len(left), dtype=left.dtype)
    m = torch.inverse(c_t @ p + scale * identity)
    inner = torch.inverse(invariant.mT @ p @ m @ invariant)
    held = identity - m @ invariant @ inner @ invariant.mT @ p
    return weight + weight @ (c_a - c_t) @ p @ held @ m


@torch.no_grad()
def oce(
    weight: Tensor,
    erased: Tensor,
    guides: Tensor,
    retain: Tensor,
    captions: Tensor,
    *,
    erase: float = 800.0,
    preserve: float = 2.0,
    general: float = 70.0,
    ridge: float = 10.0,
) -> Tensor:
    """OCE's W' = R W of one matrix, in its settings for 100 concepts.

    R is the orthogonal matrix that maximises tr(Rᵀ (−s_e G (I − G*) + s_c Σ v vᵀ + s_g W C Wᵀ + λ W Wᵀ)). G
    and G* project on the values of erased and guiding states, v are the retained states' values, and C is the
    second moment of captions' states. The determinant of R is left as it is.
    """
    bases = []
    for states in (erased, guides):
        values = weight @ states.mT
        bases.append(torch.linalg.qr(values / values.norm(dim=0)).Q)
    projectors = [basis @ basis.mT for basis in bases]
    values, identity = weight @ retain.mT, torch.eye(len(weight), dtype=weight.dtype)
    total = -erase * projectors[0] @ (identity - projectors[1]) + preserve * values @ values.mT
    total = total + general * weight @ captions @ weight.mT + ridge * weight @ weight.mT
    left, _, right = torch.linalg.svd(total)
    return left @ right @ weight


@torch.no_grad()
def sample_trajectory(
    network: Network, scheduler: DDIMScheduler, states: Tensor, z_t: Tensor, guidance_scale: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every (latent, guided noise, timestep) of one trajectory.

    ``states`` are those of ∅ and the prompt, ``[2, L, d]``. The prompt may be ∅ itself: both halves are
    evaluated all the same.
    """
    kept = []
    for timestep in scheduler.timesteps:
        uncond, cond = network(torch.cat([z_t, z_t]), timestep, states).chunk(2)
        noise = uncond + guidance_scale * (cond - uncond)
        kept.append((z_t, noise, timestep))
        z_t = scheduler.step(noise, timestep, z_t).prev_sample
    return kept


@dataclass(frozen=True)
class Networks:
    """The original, the one after stage 1, and the one that trains: three of full size in memory."""

    original: Network
    edited: Network
    trained: Network


@dataclass(frozen=True)
class Point:
    """A latent ``[1, C, H, W]`` with its timestep."""

    z_t: Tensor
    timestep: Tensor


def training_loss(
    networks: Networks, point: Point, kept: Sequence[Point], states: dict[str, Tensor], guidance: float = 15.0
) -> Tensor:
    """Loss of one iteration, with ``states`` of "uncond", "malicious" and "safe".

    Without gradient it takes three evaluations of the original network and one of the edited for each kept
    point; with gradient two, and one for each kept point.
    """
    z_t, timestep = point.z_t, point.timestep
    with torch.no_grad():
        uncond, malicious, safe = (
            networks.original(z_t, timestep, states[kind]) for kind in ("uncond", "malicious", "safe")
        )
        f_safe, f_unsafe = (cond + guidance * (cond - uncond) for cond in (safe, malicious))
        references = [networks.edited(row.z_t, row.timestep, states["uncond"]) for row in kept]
    hinges = []
    for kind in ("malicious", "uncond"):
        prediction = networks.trained(z_t, timestep, states[kind])
        difference = F.mse_loss(prediction, f_safe) - F.mse_loss(prediction, f_unsafe)
        hinges.append((difference + 0.01).clamp_min(0))
    preserve = [
        F.mse_loss(networks.trained(row.z_t, row.timestep, states["uncond"]), reference)
        for row, reference in zip(kept, references, strict=True)
    ]
    return torch.stack(hinges).mean() + 100 * torch.stack(preserve).mean()


def trained_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """All of self-attention and cross-attention's Q."""
    return [
        parameter
        for name, parameter in unet.named_parameters()
        if ".attn1." in name or name.endswith("attn2.to_q.weight")
    ]
