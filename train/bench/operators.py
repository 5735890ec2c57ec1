"""Measures our operators and other implementations: each operator in its own process, its forms interleaved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridzoo.train.bench import cases, forms, measuring
from hybridzoo.train.bench.processes import say
from hybridzoo.train.bench.rows import Row

ALLOWED = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # relative to the largest value, between forms
SHARE = 0.4  # fraction of the device's memory that a form may need


class Operator:
    """One operator, as `hybridzoo bench ops` measures it.

    Args:
        op: a key of `cases.SHAPES`.
        device, dtype: of the inputs.
        batch: images.
        size: height and width in pixels of the image that the shapes belong to.
        impl: implementation of our operator.
        turns: for each form at each shape; after three turns, stops when `budget` seconds are over.
        budget: seconds for one shape and way.
        flex: include FlexAttention.
    """

    def __init__(
        self,
        op: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 8,
        size: Sequence[int] = (224, 224),
        impl: str = "auto",
        turns: int = 9,
        budget: float = 6.0,
        flex: bool = False,
    ) -> None:
        self.op, self.place, self.dtype, self.batch, self.impl, self.flex = op, device, dtype, batch, impl, flex
        self.device, self.turns, self.budget = torch.device(device), turns, budget
        self.shapes = cases.shapes(op, (size[0], size[1]))

    def measure(self, index: int) -> list[Row]:
        """Rows of one shape: for each form the forward pass, and both passes."""
        made = cases.make(
            self.op, self.shapes[index], self.batch, self.place, getattr(torch, self.dtype), self.impl, self.flex
        )
        rows: dict[tuple[str, str], Row] = {
            (form, way): dict(part="ops", op=self.op, shape=made.shape, form=form, way=way, batch=self.batch,
                              dtype=self.dtype) | (dict(impl=self.impl) if form == "ours" else {})
            for form in made.forms for way in ("forward", "both")
        }  # fmt: skip
        ready = self._ready(made, rows)
        for way in ("forward", "both"):
            steps = {form: self._step(made, function, way) for form, function in ready.items()}
            for form, step in list(steps.items()):
                try:
                    step()
                    rows[form, way]["peak_mib"] = measuring.peak_of(step, self.device)
                except Exception as error:
                    rows[form, way]["error"] = say(error)
                    del steps[form]
            for form, found in measuring.interleaved(steps, self.device, self.turns, self.budget).items():
                rows[form, way] |= found
        return list(rows.values())

    def _ready(self, made: cases.Case, rows: dict[tuple[str, str], Row]) -> dict[str, forms.Function]:
        """The forms' functions. A form that cannot run, or that gives another result, gets rows with the reason."""
        expected: Tensor | None = None
        ready = {}
        for name, form in made.forms.items():
            try:
                if form.needs > SHARE * total_memory(self.device):
                    raise MemoryError
                function = form.make()
                with torch.no_grad():
                    out = made.call(function)
                if expected is None:
                    expected = out
                elif form.same:
                    forms.check_agreement(name, [out], [expected], ALLOWED[self.dtype])
                ready[name] = function
            except Exception as error:
                large = form.needs and isinstance(error, MemoryError)
                why = f"would need {form.needs / 2**30:.0f} GiB" if large else say(error)
                for way in ("forward", "both"):
                    rows[name, way]["error"] = why
        return ready

    def _step(self, made: cases.Case, function: forms.Function, way: str) -> measuring.Step:
        if way == "both":
            return lambda: made.backward(made.call(function))

        def forward() -> Any:
            with torch.no_grad():
                return made.call(function)

        return forward


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
