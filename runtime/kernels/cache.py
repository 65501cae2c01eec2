"""Compiled kernels, kept in memory and on disk.

An entry's name is a hash of everything that made it: the spec, the generators' source, the processor, the compiler's
version.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anncvt.runtime.kernels import store
from anncvt.runtime.kernels.integer_layer import IntegerLayer
from anncvt.runtime.kernels.spec import Spec
from anncvt.runtime.kernels.target import host

counts: Counter[str] = Counter()
"""How many kernels this process ``compiled`` and ``loaded`` from disk."""

Kernel = Spec | IntegerLayer
"""What a compiled kernel is named by."""

_ready: dict[Kernel, Callable[..., Any]] = {}
_lock = threading.Lock()
_local = threading.local()


def kernel(spec: Kernel) -> Callable[..., Any]:
    """The compiled function of ``spec``, from memory, else from disk, else compiled (about a third of a second)."""
    found = _ready.get(spec)
    if found is not None:
        return found
    with _lock:
        if spec not in _ready:
            _ready[spec] = _open(spec)
        return _ready[spec]


def use_threads(count: int) -> None:
    """Let kernels called from this thread run on ``count`` threads."""
    if getattr(_local, "threads", None) != count:
        import tvm

        # 1: the fast cores first, where they differ. The pool belongs to the calling thread.
        tvm.get_global_func("runtime.config_threadpool")(1, count)
        _local.threads = count


def clear() -> None:
    """Forget the kernels in memory (those on disk stay)."""
    with _lock:
        _ready.clear()


def path_of(spec: Kernel) -> Path:
    """The file of one kernel, whether it exists or not."""
    identity = "\n".join([repr(spec), repr(host()), _versions(), _sources()])
    return store.folder() / f"{spec.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.so"


def _open(spec: Kernel) -> Callable[..., Any]:
    import tvm

    path = path_of(spec)
    if store.intact(path):
        with contextlib.suppress(RuntimeError, OSError):
            function = tvm.runtime.load_module(str(path))["main"]
            counts["loaded"] += 1
            store.used(path)
            return function
    module = tvm.compile(tvm.IRModule({"main": _generate(spec)}), host().target())
    counts["compiled"] += 1
    # Without a writable folder or a C compiler to link with, the kernel still runs; the next process compiles it again.
    with contextlib.suppress(OSError, RuntimeError):
        _store(module, path)
    return module["main"]


def _generate(spec: Kernel) -> Any:
    if isinstance(spec, IntegerLayer):
        from anncvt.runtime.kernels import integer_plan

        return integer_plan.generate(spec).with_attr("global_symbol", "main")
    from anncvt.runtime.kernels import training

    return training.generate(spec, host())


def _store(module: Any, path: Path) -> None:
    from tvm.support.cc import get_cc

    if get_cc() is None:
        return
    store.write(path, lambda fresh: module.export_library(str(fresh)))


@functools.cache
def _versions() -> str:
    import tvm
    import tvm_ffi

    return f"{tvm.__version__} {tvm_ffi.__version__}"


@functools.cache
def _sources() -> str:
    here = Path(__file__).parent
    paths = [here.parent / "geometry.py", *sorted(here.glob("*.py"))]
    content = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()
