"""Float graphs on a CUDA device: eager or compiled, each call replayed from a CUDA graph or launched anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, fx

from qsweep.cuda.capture import captured
from qsweep.devices import on_device
from qsweep.engines._torch import channels_last_input, channels_last_weights
from qsweep.errors import Refused, why
from qsweep.hub.fixed import with_constants
from qsweep.hub.save import load
from qsweep.hub.simulate import simulation
from qsweep.machine import no_gpu

if TYPE_CHECKING:
    from qsweep.engines.base import EngineConfig, Runner


def gpu_runner(folder: Path, engine: EngineConfig, *, compile: bool, capture: bool) -> Runner:
    """The artifact on the GPU, weights resident, channels last, called once. Raises Refused where there is no device,
    or the compiler or the capture cannot take the model; memory that runs out keeps its own type."""
    if (reason := no_gpu()) is not None:
        raise Refused(reason)
    torch.backends.cudnn.benchmark = True  # a baseline is to be as fast as cuDNN can be
    model = load(folder)
    graph = channels_last_weights(with_constants(on_device(simulation(model), "cuda")))
    example = channels_last_input(torch.zeros(engine.batch_size, *model.example.shape[1:], device="cuda"))
    try:
        call = compiled(graph, example) if compile else graph
        return fixed(captured(call, example) if capture else call, example)
    except Refused as error:
        raise Refused(f"{error}; `capture: false` launches its kernels one by one") from None
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # the compiler raises dozens of types; all mean that it cannot take the model
        instead = "; without the compiler (`compile`, of `cuda` `compile_baselines`) it may" if compile else ""
        raise Refused(f"the model cannot run on the GPU: {why(error)}{instead}") from error


def compiled(graph: fx.GraphModule, example: Tensor) -> Callable[[Tensor], Tensor]:
    """`graph` by `torch.compile`, kernels chosen by measuring; it captures nothing."""
    call = torch.compile(graph, mode="max-autotune-no-cudagraphs", dynamic=False)
    with torch.no_grad():
        call(example)
    return cast(Callable[[Tensor], Tensor], call)


def fixed(call: Callable[[Tensor], Tensor], example: Tensor) -> Runner:
    """`call` for batches of one size, without gradients; called once."""

    def run(inputs: Tensor) -> Tensor:
        if inputs.shape != example.shape:
            raise Refused(f"the model on the GPU takes inputs {list(example.shape)} (got {list(inputs.shape)})")
        with torch.no_grad():
            return call(channels_last_input(inputs))

    run(example)
    return run
