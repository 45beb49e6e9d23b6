"""The form of a new run's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from experiments.explorer.panel.fields import STYLE, WIDE, field_at, field_widget, text_of, value_of
from experiments.explorer.panel.parts import heading, problem
from ibq.config import DATA_SETS, TrainConfig
from ibq.errors import ConfigError
from ibq.quantizers import Quantizer, QuantizerConfig, parse_quantizer_config

LABELS = {
    "optim.lr": "learning rate",
    "steps": "steps",
    "quantize_from": "quantize from",
    "batch_size": "images a step",
    "seed": "seed",
    "loss.pixel_weight": "pixel weight",
    "loss.perceptual": "perceptual",
    "loss.perceptual_weight": "perceptual weight",
    "loss.adversarial.weight": "adversarial weight",
}
SIZES = {"codebook_size": "K, codes", "code_dim": "D, dimension"}


class SettingsForm:
    """Widgets of a TrainConfig: data, method and options, sizes, learning rate, steps, loss weights; what has no widget
    is as in the config that the form was filled with.

    Args:
        config: what it begins with.
        train: called with the config when Train is pressed.
    """

    def __init__(self, config: TrainConfig, train: Callable[[TrainConfig], object]) -> None:
        self._base, self._train = config, train
        self._filling = False
        self._free_sizes = {name: text_of(QuantizerConfig.model_fields[name].default) for name in SIZES}
        self.data = widgets.Combobox(
            description="data",
            options=[*DATA_SETS, "imagefolder:PATH"],
            tooltip="fashion-mnist, landscapes, photos, or a folder of images as imagefolder:PATH",
            continuous_update=False,
            style=STYLE,
            layout=WIDE,
        )
        self.method = widgets.Dropdown(
            description="method", options=sorted(Quantizer.registry), tooltip="the quantizer", style=STYLE, layout=WIDE
        )
        self.sizes: dict[str, widgets.ValueWidget] = {}
        self.options: dict[str, widgets.ValueWidget] = {}
        self.others: dict[str, widgets.ValueWidget] = {}
        self.button = widgets.Button(
            description="Train",
            icon="play",
            button_style="primary",
            tooltip="Train a new run with these settings",
            layout={"width": "auto"},
        )
        self.problem = widgets.HTML()
        self._fields = widgets.VBox()
        self._fields.add_class("ibq-form")
        self.widget = widgets.VBox([self._fields, self.problem, self.button])
        self.button.on_click(lambda _: self._press())
        self.method.observe(self._new_method, "value")
        self.data.observe(self._check, "value")
        self.fill(config)

    def fill(self, config: TrainConfig) -> None:
        """Take over all settings of a config."""
        self._filling = True
        self._base = config
        self.data.value, self.method.value = config.data.name, config.quantizer.method
        self._show_quantizer(config.quantizer)
        self.others = {path: field_widget(path, *field_at(config, path), label) for path, label in LABELS.items()}
        for widget in self.others.values():
            widget.observe(self._check, "value")
        self._arrange()
        self._filling = False
        self._check()

    def config(self) -> TrainConfig:
        """Settings of the form.

        Raises:
            ConfigError: it contradicts itself; one sentence.
        """
        tree = self._base.to_json_dict()
        tree["data"]["name"] = self.data.value
        read = {name: value_of(widget) for name, widget in (self.sizes | self.options).items()}
        tree["quantizer"] = {"method": self.method.value} | read
        for path, widget in self.others.items():
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value_of(widget)
        return TrainConfig.parse(tree)

    def _show_quantizer(self, config: QuantizerConfig) -> None:
        fields, self._implied = type(config).model_fields, _is_implied(config)
        values = config.to_json_dict()
        self.sizes = {name: field_widget(name, fields[name], values[name], label) for name, label in SIZES.items()}
        self.options = {
            name: field_widget(name, field, values[name])
            for name, field in fields.items()
            if name not in SIZES and name != "method"
        }
        for widget in (self.sizes | self.options).values():
            widget.observe(self._check, "value")

    def _new_method(self, _: Any) -> None:
        """Options at the method's defaults; sizes stay as they are, unless the method's codebook follows from its
        own."""
        if self._filling:
            return
        config = parse_quantizer_config({"method": self.method.value})
        if not self._implied:
            self._free_sizes = {name: widget.value for name, widget in self.sizes.items()}
        self._show_quantizer(config)
        if not self._implied:
            for name, widget in self.sizes.items():
                widget.value = self._free_sizes[name]
        self._arrange()
        self._check()

    def _arrange(self) -> None:
        rate, *training = [self.others[path] for path in ("optim.lr", "steps", "batch_size", "seed", "quantize_from")]
        losses = [widget for path, widget in self.others.items() if path.startswith("loss.")]
        self._fields.children = (
            heading("Run"),
            self.data,
            self.method,
            *self.sizes.values(),
            rate,
            *training,
            heading(f"Options of {self.method.value}") if self.options else widgets.HTML(),
            *self.options.values(),
            heading("Loss"),
            *losses,
        )

    def _check(self, _: Any = None) -> None:
        if self._filling:
            return
        try:
            self.config()
        except ConfigError as error:
            self.problem.value, self.button.disabled = problem(str(error)), True
        else:
            self.problem.value, self.button.disabled = "", False

    def _press(self) -> None:
        try:
            self._train(self.config())
        except ConfigError as error:
            self.problem.value = problem(str(error))


def _is_implied(config: QuantizerConfig) -> bool:
    """True where a method has sizes of its own, from which its codebook follows."""
    return bool(type(config).model_fields["code_dim"].default != QuantizerConfig.model_fields["code_dim"].default)
