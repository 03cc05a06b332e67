"""The optimizers of the training loop: on a GPU one kernel, whose learning rate may change after it was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qsweep.tasks.base import Training

_SQUARES = 0.999
"""Decay of the mean of squared gradients (beta2 of AdamW)."""


def optimizer_of(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """That of `training` for the parameters of `model`, which are on its device; those that do not train are left out.

    Weight decay is on parameters of two dimensions and more.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    on_cpu, momentum = training.device == "cpu", training.momentum
    if training.optimizer == "adamw":
        adaptive = torch.optim.AdamW if on_cpu else DeviceAdamW
        return adaptive(groups, lr=training.rate, betas=(momentum, _SQUARES))
    return (torch.optim.SGD if on_cpu else DeviceSGD)(
        groups, lr=training.rate, momentum=momentum, nesterov=momentum > 0
    )


class OnDevice(torch.optim.Optimizer):
    """An optimizer in one kernel, which reads learning rates from the device: a recorded step follows their schedule.

    `param_groups` hold them as numbers, as ever; `renew` brings them to where a replay reads them. All that an
    optimizer remembers is made at once: a parameter whose first gradient comes late has it in a recorded step, too.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)  # type: ignore[call-arg]  # that of the class beside it
        devices = (parameter.device for group in self.param_groups for parameter in group["params"])
        self._device = next(devices, torch.device("cpu"))
        self._rates = [torch.tensor(float(group["lr"]), device=self._device) for group in self.param_groups]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(self.remembered(parameter, group))

    def remembered(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What the optimizer keeps of `parameter` before its first step."""
        raise NotImplementedError

    def renew(self) -> None:
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            rate.fill_(group["lr"])

    def step(self, closure: Any = None) -> Any:
        if self._device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self.renew()
        numbers = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            return super().step(closure)
        finally:
            for group, number in zip(self.param_groups, numbers, strict=True):
                group["lr"] = number


class DeviceSGD(OnDevice, torch.optim.SGD):
    def remembered(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}


class DeviceAdamW(OnDevice, torch.optim.AdamW):
    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, capturable=True, **settings)

    def remembered(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        steps = torch.zeros((), device=parameter.device)
        return {"step": steps, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
