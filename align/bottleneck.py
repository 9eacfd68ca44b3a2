"""Bottleneck adapters as a method of PEFT, which has none: ``y + up(gelu(down(y)))``.

One after each attention and each feed-forward sublayer (Houlsby et al. 2019) or after the latter
only (Pfeiffer et al. 2021), before the residual connection. ``up`` begins at 0, so that training
starts at the base exactly. Layer norms stay frozen. Importing this module makes PEFT load, save and
switch these adapters like its own; they cannot be merged, since they are not linear.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

PEFT_TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """``adapter_config.json`` of a bottleneck adapter.

    Attributes:
        size: inner width.
        target_modules: names of the linear layers whose output the adapters change, as in PEFT.
        modules_to_save: other modules that are trained and saved whole, as in PEFT.
    """

    size: int = 64
    target_modules: str | list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with bottlenecks behind it, one per adapter; float32 whatever the layer is."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._active_adapter = name
        self.add(name, config)

    def add(self, name: str, config: BottleneckConfig) -> None:
        """Add an adapter that changes nothing yet."""
        base: Any = self.get_base_layer()
        width = base.out_features if isinstance(base, nn.Linear) else base.nf  # GPT-2's Conv1D
        place = {"device": base.weight.device, "dtype": torch.float32}
        down = nn.Linear(width, config.size, **place)
        up = nn.Linear(config.size, width, **place)
        for start in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output, changed by the active adapters in turn."""
        output: Tensor = self.base_layer(x, *args, **kwargs)
        names = [] if self.disable_adapters else self.active_adapters
        for name in names:
            if name in self.bottleneck_down:
                states = output.float()
                change = self.bottleneck_up[name](F.gelu(self.bottleneck_down[name](states)))
                output = (states + change).to(output.dtype)
        return output


class BottleneckModel(BaseTuner):
    """A model some of whose linear layers are ``BottleneckLayer``."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = {}  # noqa: RUF012 (PEFT declares it for instances)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# PEFT's own keys are members of an enumeration of texts, which cannot be added to.
_KEY: Any = PEFT_TYPE
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = BottleneckModel.prefix
