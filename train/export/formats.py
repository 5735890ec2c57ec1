"""The formats: how each records a network, writes its file with the metadata in it, and opens it again."""

from __future__ import annotations

import copy
import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hybridzoo.train.export import capture
from hybridzoo.train.export.capture import STEP, Sizes, as_function, quiet
from hybridzoo.train.export.sources import Reader, Source

OPSET = 20  # of ONNX: ONNX Runtime 1.17 (2024) and everything since read it
NOTE = "hybridzoo.json"  # the metadata's name in files that hold files


class Format(ABC):
    """A way to keep a network in a file.

    Attributes:
        suffix: of the file.
        title: for people.
        packages: what reading and writing needs beside PyTorch, by the names of their imports.
    """

    suffix: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()

    def need_packages(self) -> None:
        """Raise ModuleNotFoundError, which the command line explains, where one is missing."""
        for package in self.packages:
            importlib.import_module(package)

    def record(self, source: Source, dynamic: bool) -> tuple[Any, Sizes, str]:
        """A graph in the format's own form, the sizes that it takes, and why these are not all."""
        program, sizes, why = capture.dynamic(source) if dynamic else capture.fixed(source)
        return self.convert(program, source), sizes, why

    @abstractmethod
    def convert(self, program: ExportedProgram, source: Source) -> Any:
        """What `write` writes, of a graph of PyTorch's."""

    @abstractmethod
    def write(self, recorded: Any, path: Path, metadata: dict[str, Any]) -> None:
        """Write what `record` gave; further files may lie beside `path`, with names that start with its name."""

    @abstractmethod
    def open(self, path: Path) -> Reader:
        """The file as a function, on the CPU in float32: normalised image -> outputs."""

    @abstractmethod
    def metadata(self, path: Path) -> dict[str, Any]:
        """What `write` put into the file."""


class Pt2(Format):
    suffix = ".pt2"
    title = "torch.export"

    def convert(self, program: ExportedProgram, source: Source) -> ExportedProgram:
        return program

    def write(self, recorded: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
        unguarded = copy.copy(recorded)
        unguarded.example_inputs = None  # without them, what is loaded checks no guards, see `capture`
        with quiet():
            torch.export.save(unguarded, path, extra_files={NOTE: json.dumps(metadata)})

    def open(self, path: Path) -> Reader:
        with quiet():
            return as_function(torch.export.load(path).module())

    def metadata(self, path: Path) -> dict[str, Any]:
        extra = {NOTE: ""}
        with quiet():
            torch.export.load(path, extra_files=extra)
        return dict(json.loads(extra[NOTE]))


class TorchScript(Format):
    suffix = ".torchscript"
    title = "TorchScript"

    def record(self, source: Source, dynamic: bool) -> tuple[Any, Sizes, str]:
        size = capture.tries(source.size).trace if dynamic else (*source.size, 2)
        with torch.no_grad(), quiet():
            traced = torch.jit.trace(source.network, source.image(*size), check_trace=False)
        if not dynamic:
            return traced, capture.only(source.size), ""
        height, width = source.size
        try:
            sizes, why = capture.settle(source, as_function(traced), ((STEP, None), (STEP, None)))
        except Exception:  # smaller images than the usual ones may take another way
            sizes, why = capture.settle(source, as_function(traced), ((height, None), (width, None)))
        return traced, sizes, why

    def convert(self, program: ExportedProgram, source: Source) -> Any:
        raise NotImplementedError  # a trace is made of the network itself

    def write(self, recorded: Any, path: Path, metadata: dict[str, Any]) -> None:
        with quiet():
            torch.jit.save(recorded, str(path), _extra_files={NOTE: json.dumps(metadata)})

    def open(self, path: Path) -> Reader:
        with quiet():
            return as_function(torch.jit.load(str(path), map_location="cpu"))

    def metadata(self, path: Path) -> dict[str, Any]:
        extra = {NOTE: ""}
        with quiet():
            torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return dict(json.loads(extra[NOTE]))


class Onnx(Format):
    suffix = ".onnx"
    title = "ONNX"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def convert(self, program: ExportedProgram, source: Source) -> Any:
        from onnxscript import opset20, optimizer

        def int_mm(left: Any, right: Any) -> Any:  # (M, K) and (K, N) int8 -> int32, which the exporter lacks
            return opset20.MatMulInteger(left, right)

        with quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                optimize=False,
                input_names=["image"],
                output_names=list(source.outputs),
                custom_translation_table={torch.ops.aten._int_mm.default: int_mm},
            )
            assert converted is not None
            # `optimize=True` does more, and takes what is below 1e-8 in a sum for zero (onnxscript 0.7): linear
            # attention without any weight, 0 / (0 + 1e-15), became 0 / 0.
            optimizer.fold_constants(converted.model)
            optimizer.remove_unused_nodes(converted.model)
        return converted

    def write(self, recorded: Any, path: Path, metadata: dict[str, Any]) -> None:
        props = recorded.model.metadata_props
        props.clear()
        props.update({key: json.dumps(value) for key, value in metadata.items()})
        with quiet():
            recorded.save(path)  # weights of more than 2 GB lie in a file beside

    def open(self, path: Path) -> Reader:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it says of an error, it raises too
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(image: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.from_numpy(out) for out in session.run(None, {"image": image.numpy()}))

        return run

    def metadata(self, path: Path) -> dict[str, Any]:
        import onnx

        model = onnx.load(path, load_external_data=False)
        return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


class OpenVino(Format):
    """OpenVINO's own files, of the ONNX graph: it converts that faster than PyTorch's, and to the same operators."""

    suffix = ".xml"
    title = "OpenVINO"
    packages = ("openvino", "onnx", "onnxscript")

    def convert(self, program: ExportedProgram, source: Source) -> Any:
        import tempfile

        import openvino

        with tempfile.TemporaryDirectory() as folder, quiet():
            file = Path(folder, "network.onnx")
            Onnx().convert(program, source).save(file)
            return openvino.convert_model(file)

    def write(self, recorded: Any, path: Path, metadata: dict[str, Any]) -> None:
        import openvino

        recorded.set_rt_info(json.dumps(metadata), ["hybridzoo"])
        openvino.save_model(recorded, path, compress_to_fp16=False)

    def open(self, path: Path) -> Reader:
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(image: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.from_numpy(out.copy()) for out in compiled(image.numpy()).values())

        return run

    def metadata(self, path: Path) -> dict[str, Any]:
        import openvino

        return dict(json.loads(openvino.Core().read_model(path).get_rt_info(["hybridzoo"]).astype(str)))


class Aoti(Format):
    """Machine code of this kind of CPU, made by TorchInductor: a package that PyTorch's C++ and Python load."""

    suffix = ".aoti.pt2"
    title = "AOTInductor"

    def convert(self, program: ExportedProgram, source: Source) -> ExportedProgram:
        return program

    def write(self, recorded: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
        options = {"aot_inductor.metadata": {NOTE: json.dumps(metadata)}}
        with quiet():
            torch._inductor.aoti_compile_and_package(recorded, package_path=str(path), inductor_configs=options)

    def open(self, path: Path) -> Reader:
        with quiet():
            return as_function(torch._inductor.aoti_load_package(str(path)))

    def metadata(self, path: Path) -> dict[str, Any]:
        with quiet():
            return dict(json.loads(torch._inductor.aoti_load_package(str(path)).get_metadata()[NOTE]))


FORMATS: dict[str, Format] = {
    "onnx": Onnx(),
    "pt2": Pt2(),
    "openvino": OpenVino(),
    "torchscript": TorchScript(),
    "aoti": Aoti(),
}
