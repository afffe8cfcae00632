"""The noise schedule of a model, which its own scheduler gives.

Models that predict ε or v have diffusers' DDIM of the same ᾱ. Models of flow matching keep their scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from trce_lightning.config.schema import FLOW_SAMPLERS, SAMPLERS
from trce_lightning.errors import InputError
from trce_lightning.sampling import DIFFUSION_PREDICTIONS, Schedule, flow_schedule

DEFAULTS = "_use_default_values"
"""The key under which diffusers lists settings that were left at their defaults."""
SHAPES = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""The settings that change a flow's noise levels in another way than by a shift."""
ATOL = 1e-6
"""The absolute tolerance of ᾱ. Some schedulers write 2⁻²⁴ for zero."""


def ddim_of(scheduler: Any) -> DDIMScheduler:
    """Return the DDIM scheduler of the same noise schedule. If there is none, raise ``InputError``.

    All settings are copied, as if the scheduler was saved and read again. diffusers' ``from_config`` would
    replace one class's defaults by another's, and the ends of β differ between classes. As in every pipeline
    that diffusers opens, ``clip_sample`` is off. If a class has no ``steps_offset``, it is 1.
    """
    name, config = type(scheduler).__name__, scheduler.config
    _refuse_other_processes(scheduler)
    settings = {"steps_offset": 1, **{key: value for key, value in config.items() if key != DEFAULTS}}
    try:
        ddim = DDIMScheduler.from_config(settings, clip_sample=False)
    except NotImplementedError as error:
        raise InputError(f"model: expected a noise schedule that DDIM has, got {name}: {error}") from error
    if not has_schedule(scheduler, ddim.alphas_cumprod):
        raise InputError(f"model: expected the noise schedule that {name}'s settings name, got another")
    if ddim.config.prediction_type == "epsilon" and bool((ddim.alphas_cumprod == 0).any()):
        raise InputError(
            f"model: expected prediction_type v_prediction with rescale_betas_zero_snr, got epsilon in "
            f"{name}: noise that is predicted from noise alone says nothing of the picture"
        )
    return ddim


def scheduler_like(
    ddim: DDIMScheduler, name: str, num_steps: int, timestep_spacing: str | None, device: torch.device | str
) -> Any:
    """Return diffusers' scheduler of class ``name`` on the noise schedule of ``ddim``.

    Its timesteps are set. If ``timestep_spacing`` is None, the spacing is the model's own. If the class is
    not supported, has another schedule or can't take ``num_steps``, raise ``InputError``.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {name}")
    spacing = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    scheduler = getattr(diffusers, name).from_config(ddim.config, **spacing)
    if not has_schedule(scheduler, ddim.alphas_cumprod):
        raise InputError(
            f"sampler: expected one that draws by the model's noise schedule, got {name}, which has no "
            "rescale_betas_zero_snr"
        )
    try:
        scheduler.set_timesteps(num_steps, device=device)
    except ValueError as error:  # PNDM's first phase takes four steps
        raise InputError(
            f"num_inference_steps: expected a number that {name} can take, got {num_steps}: {error}"
        ) from error
    check_placed(scheduler.timesteps, scheduler.config.num_train_timesteps, num_steps)
    return scheduler


def flow_of(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """Return a copy of a scheduler of flow matching. ``InputError`` on another scheduler or process."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise InputError(f"model: expected a scheduler of flow matching, {FLOW_SAMPLERS[0]}, got {name}")
    for option, why in (
        ("stochastic_sampling", "since trajectories are deterministic"),
        ("invert_sigmas", "since noise is at the beginning"),
    ):
        if scheduler.config.get(option):
            raise InputError(f"model: expected {option}=False, {why}, got True in {name}")
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def flow_levels(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, options: Mapping[str, Any]
) -> Schedule:
    """Return the noise levels of ``num_steps`` steps.

    ``options`` are what the model's pipeline gives to ``set_timesteps``. If the model has fewer timesteps,
    raise ``InputError``.
    """
    available = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= available:
        raise InputError(f"num_inference_steps: expected from 1 to {available} steps, got {num_steps}")
    scheduler.set_timesteps(num_steps, **options)
    return flow_schedule(scheduler.sigmas.cpu(), scheduler.timesteps.cpu())


def flow_scheduler(
    own: FlowMatchEulerDiscreteScheduler,
    name: str,
    num_steps: int,
    timestep_spacing: str | None,
    options: Mapping[str, Any],
    device: torch.device | str,
) -> Any:
    """Return diffusers' scheduler of class ``name``, one of ``FLOW_SAMPLERS``, on the flow of ``own``.

    Its timesteps are set. DPM-Solver++ shifts its own noise levels as ``own`` does, to s σ / (1 + (s − 1) σ).
    s is the shift, or with a shift by resolution e^μ (exponential) or μ (linear). If the class is another, or
    the flow's levels are not given by a shift, or ``timestep_spacing`` is not None, raise ``InputError``.
    """
    if name not in FLOW_SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(FLOW_SAMPLERS)} for flow matching, got {name}")
    if timestep_spacing is not None:
        raise InputError(
            "model.timestep_spacing: expected none for flow matching, whose shift places the steps, got "
            f"{timestep_spacing}"
        )
    if name == FLOW_SAMPLERS[0]:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)
        scheduler.set_timesteps(num_steps, device=device, **options)
        return scheduler
    config = own.config
    if shaped := [option for option in SHAPES if config.get(option)]:
        raise InputError(f"sampler: expected {FLOW_SAMPLERS[0]} for a model with {shaped[0]}, got {name}")
    shift = own.shift
    if config.use_dynamic_shifting:
        shift = math.exp(options["mu"]) if config.time_shift_type == "exponential" else options["mu"]
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler


def has_schedule(scheduler: Any, alphas_cumprod: Tensor) -> bool:
    """Return whether a scheduler's own ᾱ are equal to these."""
    own = scheduler.alphas_cumprod
    return own.shape == alphas_cumprod.shape and torch.allclose(
        own.double().cpu(), alphas_cumprod.double().cpu(), atol=ATOL
    )


def check_placed(timesteps: Tensor, available: int, num_steps: int) -> Tensor:
    """Return ``timesteps``. Raise ``InputError`` if diffusers has placed one outside ``[0, available)``.

    Rounding can cause that: with the spacing "trailing" for 61 steps, or with "leading" for ``available``
    steps.
    """
    if int(timesteps.min()) < 0 or int(timesteps.max()) >= available:
        raise InputError(
            f"num_inference_steps: expected a number whose steps lie between 0 and {available - 1}, got "
            f"{num_steps}, which diffusers places from {int(timesteps.max())} to {int(timesteps.min())}; "
            "take one step less"
        )
    return timesteps


def _refuse_other_processes(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise InputError(
            f"model: expected a scheduler with a noise schedule (betas), got {name}; flow "
            "matching and continuous noise levels have no adapter in this family"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in DIFFUSION_PREDICTIONS or config.get("use_flow_sigmas"):
        raise InputError(
            f"model: expected prediction_type {' or '.join(DIFFUSION_PREDICTIONS)}, got "
            f"{prediction_type}{' with use_flow_sigmas' if config.get('use_flow_sigmas') else ''} in {name}; "
            "others have no adapter yet"
        )
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise InputError(
                f"model: expected {option}=False, since latents have no fixed range, got True in {name}; set "
                f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config, {option}=False)"
            )
