"""A single operator in onnxruntime, timed by the call and by onnxruntime's own profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


class Session:
    """A model on ``threads`` threads, with the profiler on.

    Args:
        model: one operator, and what is fused into it.
        feed: its inputs.
        threads: of one call.
        full: whether onnxruntime may change to its blocked layout.
    """

    def __init__(self, model: onnx.ModelProto, feed: Mapping[str, np.ndarray], threads: int, full: bool = True) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        levels = onnxruntime.GraphOptimizationLevel
        settings.graph_optimization_level = levels.ORT_ENABLE_ALL if full else levels.ORT_ENABLE_EXTENDED
        settings.enable_profiling = True
        self._folder = tempfile.TemporaryDirectory()
        settings.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        self._feed = dict(feed)

    def call(self) -> object:
        return self._session.run(None, self._feed)

    def node_seconds(self, *operators: str) -> float:
        """The least time that the profiler saw for one of ``operators`` (fused names too); ends the profiling."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._folder.cleanup()
        kernels = [e for e in events if e.get("name", "").endswith("_kernel_time")]
        return min(e["dur"] for e in kernels if e["args"].get("op_name") in operators) * 1e-6
