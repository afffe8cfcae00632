"""Context managers that restore what :func:`~.api.erase` changes in a caller's process and pipeline."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.version import VersionBase
from torch import nn


@contextmanager
def hydra_kept() -> Iterator[None]:
    """Let the code within use Hydra, then restore the caller's application and ConfigStore."""
    Plugins.instance()  # its first call adds Hydra's own choices
    store, application, version = ConfigStore.instance(), GlobalHydra.instance(), VersionBase.instance()
    choices, of_caller, version_base = _copied(store.repo), application.hydra, version.version_base
    application.clear()
    try:
        yield
    finally:
        application.hydra = of_caller
        GlobalHydra.set_instance(application)
        store.repo, version.version_base = choices, version_base


def _copied(choices: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of Hydra's groups. The nodes that they hold are not copied."""
    return {name: _copied(node) if isinstance(node, dict) else node for name, node in choices.items()}


@contextmanager
def process_kept() -> Iterator[None]:
    """Restore random states, environment, log handlers and warning filters.

    If a W&B run began within, end it.
    """
    environment, root = dict(os.environ), logging.getLogger()
    handlers, run = list(root.handlers), _wandb_run()
    states, devices = (random.getstate(), np.random.get_state()), range(torch.cuda.device_count())  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if _wandb_run() is not run:
            sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def pipeline_kept(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Restore devices, memory layout, modes and gradients of a pipeline's networks, but not the weights."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    devices = [next(network.parameters()).device for network in networks]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    checkpointing = [isinstance(n, ModelMixin) and n.is_gradient_checkpointing for n in networks]
    parameters = [
        (parameter, parameter.requires_grad, parameter.grad, parameter.stride())
        for network in networks
        for parameter in network.parameters()
    ]
    try:
        yield
    finally:
        for network, device, recomputes in zip(networks, devices, checkpointing, strict=True):
            network.to(device)
            if isinstance(network, ModelMixin) and network.is_gradient_checkpointing != recomputes:
                (
                    network.enable_gradient_checkpointing
                    if recomputes
                    else network.disable_gradient_checkpointing
                )()
        for parameter, requires_grad, gradient, stride in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
            if parameter.stride() != stride:
                laid_out = torch.empty_strided(
                    parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
                )
                parameter.data = laid_out.copy_(parameter.data)
        for module, is_training in modes:
            module.training = is_training
