"""Read pickles without running them: whatever a pickle names becomes an inert stand-in.

``torch.save`` writes pickles, and loading a pickle normally calls what it names. Here nothing is imported and nothing
is called: tensors become :class:`TensorRef` (where their bytes are), foreign objects become :class:`Inert`, and a
pickle that asks for a function call is refused by the function's name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar, cast

from anncvt.errors import AnncvtError

#: A checkpoint's pickle holds names, shapes and settings; one with more steps than this is not a checkpoint.
MAX_OPCODES = 20_000_000
MAX_BYTES = 512 << 20
#: Tuples inside a tuple, each counted as often as it occurs there: hashing one visits them all. Also the number of
#: these in all keys of dictionaries and sets, because tuples can be made whose hashes are equal.
MAX_NESTED = 10_000
#: Integers beyond 64 bits (old files hold one, as a mark): their hashes can be made equal.
MAX_LONG = 1_000

#: Storage classes of torch, by the dtype of their elements.
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "UntypedStorage": "uint8",
}

#: What makes tensors that have no bytes to read: what they are, what to do.
UNREADABLE = {
    "torch._utils._rebuild_qtensor": ("quantised", "use the network before quantisation"),
    "torch._utils._rebuild_sparse_tensor": ("a sparse tensor", "save it dense, with tensor.to_dense()"),
    "torch._utils._rebuild_meta_tensor_no_storage": ("on the meta device, without values", "save it with its weights"),
}
#: Callables that settings saved beside the weights use (NumPy scalars, paths, dates). They are not called either.
_HARMLESS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "collections": "Counter defaultdict deque",
        "copyreg": "_reconstructor",
        "copy_reg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "functools": "partial",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "torch": "device",
        "torch.serialization": "_get_layout",
        "torch.jit._pickle": "build_boollist build_doublelist build_intlist build_tensorlist restore_type_tag",
        "torch._utils": "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_nested_tensor "
        "_rebuild_meta_tensor_no_storage _rebuild_device_tensor_from_numpy "
        "_rebuild_device_tensor_from_cpu_tensor _rebuild_wrapper_subclass",
        "uuid": "UUID",
    }.items()
    for name in names.split()
)


@dataclass(frozen=True)
class StorageRef:
    """Bytes of a storage inside the file: ``numel`` elements of ``dtype`` under ``key``, from element ``start``."""

    key: str
    dtype: str
    numel: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A strided view into a storage; offset, sizes and strides in elements, not yet checked against the storage."""

    storage: StorageRef
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Class(type):
    """Makes stand-ins note when the pickle calls them (``REDUCE``), as opposed to making an empty instance."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        stand_in = cast("type[Inert]", cls)
        stand_in.calls.add(stand_in.path)
        return stand_in.__new__(stand_in, *args)


class Inert(metaclass=_Class):
    """Stands for an instance of a class or function the pickle names; its attributes are what the pickle stored."""

    path: ClassVar[str]  # module.name
    calls: ClassVar[set[str]]  # of the whole pickle
    arguments: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        instance = object.__new__(cls)
        instance.arguments = args
        return instance

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = state[0]
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def __setitem__(self, key: Any, value: Any) -> None:
        return None

    def append(self, item: Any) -> None:
        return None

    def extend(self, items: Any) -> None:
        return None


@dataclass(frozen=True)
class _Storage:
    dtype: str


@dataclass
class Unpickled:
    """What a pickle holds."""

    value: Any
    names: set[str] = field(default_factory=set)  # every class and function it names, as module.name
    calls: set[str] = field(default_factory=set)  # those it wants called, harmless ones included


def unpickle(stream: IO[bytes], where: str) -> Unpickled:
    """Read one pickle from ``stream``, leaving the position behind it.

    Raises:
        AnncvtError: broken, absurdly large, or wants to call a function that no checkpoint needs.
    """
    try:
        data = _bounded(stream)
        reader = _Reader(io.BytesIO(data), encoding="latin1")
        value = reader.load()
    except AnncvtError:
        raise
    except Exception as error:
        raise corrupt(where, str(error) or type(error).__name__) from error
    refused = sorted(name for name in reader.calls if not _harmless(name))
    if refused:
        raise AnncvtError(
            f"loading this file would call {', '.join(refused[:3])}, which no checkpoint needs: refused, "
            "nothing was run",
            where=where,
            fix="save the weights alone, torch.save(model.state_dict(), path), or, if you trust the file's author "
            "with your machine, pass --trust-pickle",
        )
    return Unpickled(value, reader.names, reader.calls)


def corrupt(where: str, detail: str) -> AnncvtError:
    """The error for a file that starts like a checkpoint and does not hold one."""
    return AnncvtError(
        f"the checkpoint is damaged or cut short ({detail})", where=where, fix="download or copy the file again"
    )


def _bounded(stream: IO[bytes]) -> bytes:
    """The bytes of the next pickle, after a static walk that bounds what reading it can cost."""
    start = stream.tell()
    nesting, long = _Nesting(), 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES or stream.tell() - start > MAX_BYTES:
            raise ValueError("its index is absurdly large")
        # The memo is an array in CPython: one huge index would allocate gigabytes.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > MAX_OPCODES:
            raise ValueError("its index is absurdly large")
        long += isinstance(argument, int) and argument.bit_length() > 64
        if nesting.step(opcode, argument) > MAX_NESTED or nesting.keys > MAX_NESTED or long > MAX_LONG:
            raise ValueError("its index is absurdly nested")
    end = stream.tell()
    stream.seek(start)
    return stream.read(end - start)


class _Nesting:
    """How many tuples (and frozen sets) each value on a pickle's stack contains, without building one.

    A few dozen bytes can name a tuple of two equal tuples of two equal tuples and so on: small in memory, but whoever
    hashes it (a dictionary whose key it is) visits every path.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []  # None: a mark
        self.memo: dict[int, int] = {}
        self.keys = 0  # in all that was hashed

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """Take one opcode; returns the number for the value it leaves on top."""
        name, stack = opcode.name, self.stack
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = stack[-1] or 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo.get(int(argument), 0))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(None)
        elif name == "POP":
            stack.pop()
        else:
            to_mark, single, made = _STACK_EFFECTS[name]
            taken: list[int] = []
            while to_mark and (value := stack.pop()) is not None:
                taken.append(value)
            taken += [stack.pop() or 0 for _ in range(single)]
            if name in _HASHED:
                self.keys += sum(taken[_HASHED[name]])
            held = {"TUPLE": 1 + sum(taken), "FROZENSET": 1 + sum(taken), "REDUCE": 1}
            for _ in range(made):
                stack.append(held.get(name.rstrip("123"), 0))
        return (stack[-1] or 0) if stack else 0


def _stack_effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """Whether all down to a mark is popped, how many values besides, and how many are pushed."""
    to_mark = pickletools.markobject in opcode.stack_before
    slices = (pickletools.markobject, pickletools.stackslice)
    return to_mark, sum(kind not in slices for kind in opcode.stack_before), len(opcode.stack_after)


#: Which of the values that an opcode takes it hashes, the topmost first.
_HASHED = {
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(1, None, 2),
    "ADDITEMS": slice(None),
    "FROZENSET": slice(None),
}
_STACK_EFFECTS = {opcode.name: _stack_effect(opcode) for opcode in pickletools.opcodes}


def _harmless(name: str) -> bool:
    if name in _HARMLESS:
        return True
    # Enumeration members inside modules of the known libraries are stored as calls of their class.
    return name.startswith(("torch.nn.", "torchvision.", "timm.")) and name.rpartition(".")[2][:1].isupper()


class _Call:
    """A function of this module as a pickle gets to see it: pickles may set attributes on what they name, not here."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self.names: set[str] = set()
        self.calls: set[str] = set()
        self._classes: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        self.names.add(path)
        if path not in self._classes:
            self._classes[path] = self._stand_in(module, name, path)
        return self._classes[path]

    def _stand_in(self, module: str, name: str, path: str) -> Any:
        if path in _CONTAINERS:
            return _Call(_CONTAINERS[path])
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return _Storage(STORAGE_DTYPES[name])
        if module in ("torch._utils", "torch._tensor") and name in _REBUILD:
            return _Call(_REBUILD[name])
        return _Class(name, (Inert,), {"path": path, "calls": self.calls})

    def persistent_load(self, saved_id: Any) -> Any:
        kind, *rest = saved_id
        if kind == "module":  # old files keep the source text of a class beside its name
            return rest[0]
        storage, key, _location, numel, *view = rest
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(numel, int) or numel < 0:
            raise ValueError("unknown persistent object")
        if view and view[0] is not None:
            _view_key, start, size = view[0]
            return StorageRef(str(key), storage.dtype, int(size), int(start))
        return StorageRef(str(key), storage.dtype, numel)


def _hashable(values: Any) -> list[Any]:
    """Values that are cheap to hash; the static walk does not see what a container is called with."""
    items = list(values)
    if not all(item is None or isinstance(item, str | bytes | int | float) for item in items):
        raise ValueError("a set or dictionary of other things than names and numbers")
    return items


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    items = [(key, value) for key, value in pairs]
    _hashable(key for key, _ in items)
    return OrderedDict(items)


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": lambda sizes=(): tuple(_hashable(sizes)),
    **{
        f"{module}.{name}": make
        for module in ("builtins", "__builtin__")
        for name, make in {
            "set": lambda values=(): set(_hashable(values)),
            "frozenset": lambda values=(): frozenset(_hashable(values)),
            "list": lambda values=(): list(values),
            "dict": _ordered,
        }.items()
    },
}


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    dtype = rest[2].path.removeprefix("torch.") if len(rest) > 2 and hasattr(rest[2], "path") else storage.dtype
    numbers = [offset, *size, *stride]
    if not isinstance(storage, StorageRef) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor with impossible sizes")
    if len(size) != len(stride) or len(size) > 64:
        raise ValueError("a tensor with impossible sizes")
    return TensorRef(storage, dtype, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return function(*args)


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
    "_rebuild_from_type_v2": _rebuild_from_type,
}
