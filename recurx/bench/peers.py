"""Other engines that run an exported supervision step: OpenVINO and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurx.models import RecursiveModel
from recurx.onnx_export import export_onnx

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def peer(engine: str, model: RecursiveModel, dtype: str, batch: int, folder: str) -> Run:
    """What runs the step of an fp32 model by another engine: {input: tensor} to {output: tensor}.

    Args:
        engine: "openvino" or "onnxruntime".
        dtype: "bf16" lets OpenVINO round its products.
        folder: where the exported file may lie.
    """
    path = Path(folder) / f"{engine}-{dtype}.onnx"
    export_onnx(model, path, batch)
    return {"openvino": _openvino, "onnxruntime": _onnxruntime}[engine](path, dtype)


def _openvino(path: Path, dtype: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request, names = compiled.create_infer_request(), [o.any_name for o in compiled.outputs]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        request.infer({name: tensor.numpy() for name, tensor in inputs.items()})
        found = (request.get_output_tensor(i).data for i in range(len(names)))
        return {name: torch.from_numpy(data) for name, data in zip(names, found, strict=True)}

    return run


def _onnxruntime(path: Path, dtype: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(path, options)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(data) for name, data in zip(names, found, strict=True)}

    return run
