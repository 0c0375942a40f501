"""A pretend CUDA device, for tests without a GPU.

Its tensors say `cuda:0` and hold CPU values. They refuse what CUDA refuses, such as operations on tensors of two
devices. Every kernel, every wait of the host for the device, and every upload is counted. A graph records the kernels,
and runs them again on the same memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ropewalk.engine.runners.gpu import step

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_HALF = (torch.float16, torch.bfloat16)
_WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "repeat_interleave"}
_COPIES = {"_to_copy", "copy_", "_copy_from"}
_SCALES_ON_CPU = {"index", "index_put", "index_put_", "_index_put_impl_"}  # their indices may be on the CPU
_NO_KERNEL = {"lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "detach_"}


class CudaTensor(Tensor):
    """A tensor on the pretend device; `values` holds its numbers on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",  # without CUDA in torch, a tensor of its own cannot say cuda
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:  # printing a tensor would copy it
        return f"CudaTensor({list(self.shape)}, {self.dtype})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    is_cuda, is_cpu, is_meta = True, False, False  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _running().attention(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        return _running().run(func, args, kwargs or {})


class PretendCuda(TorchDispatchMode):
    """Runs the operations of the pretend device, and counts them.

    Attributes:
        kernels: operations on the device, views left out.
        syncs: waits of the host for the device: copies from it, and operations whose result the host needs.
        uploads: copies to the device.
        free: bytes of memory that the device says are free.
        current: the index of the device that the host has chosen, or None.
        recorded: the kernels of the graph that is being captured, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.syncs, self.uploads = Counter[str](), Counter[str](), Counter[str]()
        self.free = 1 << 40
        self.current: int | None = None
        self.recorded: list[Callable[[], object]] | None = None

    @contextlib.contextmanager
    def choose(self, device: torch.device) -> Iterator[None]:
        """`torch.cuda.device`."""
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextlib.contextmanager
    def capture(self, graph: _Graph, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        """`torch.cuda.graph`."""
        self.recorded = graph.kernels
        try:
            yield
        finally:
            self.recorded = None

    @staticmethod
    def aside() -> contextlib.AbstractContextManager[object]:
        """For what runs on the CPU alone: within it, no operation is looked at."""
        return _disable_current_modes()

    def reset(self) -> None:
        """Set all counts to 0."""
        for counts in (self.kernels, self.syncs, self.uploads):
            counts.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: on the CPU if nothing of it is on the device, else refused or counted."""
        name, is_composite, is_view = _known(func)
        if is_composite:
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)  # `decompose` is torch's slow twin in Python
        target = kwargs.get("device")
        leaves = _tensors((*args, *kwargs.values()))
        here = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
        there = [leaf for leaf in leaves if not isinstance(leaf, CudaTensor)]
        to_device = bool(here) if target is None else self._is_device(target, leaves, here, name)
        if not here and not to_device:
            return func(*args, **{**kwargs, **({"pin_memory": False} if kwargs.get("pin_memory") else {})})
        if name in _COPIES:
            return self._copy(func, name, args, kwargs, to_device)
        if here:
            self._check_devices(name, args, there)
            if "for_cpu" in name:
                raise NotImplementedError(f"Could not run '{func.name()}' with arguments from the 'CUDA' backend")
        if name in _WAITS:
            self._count_host(self.syncs, name)
        if name == "_scaled_dot_product_flash_attention":
            return self._flash(*args, **kwargs)
        values, places = {key: _on_cpu(value) for key, value in kwargs.items()}, _on_cpu(args)
        values.pop("pin_memory", None)
        result = func(*places, **values)
        if name not in _NO_KERNEL and not is_view:
            self.kernels[name] += 1
            self._record(func, places, values, result)
        if func._schema.is_mutable:
            written = [
                args[place] if place < len(args) else kwargs[argument.name]
                for place, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            return written[0] if len(written) == 1 else tuple(written)
        return _on_device(result) if to_device else result

    @staticmethod
    def _is_device(target: Any, leaves: list[Tensor], here: list[Tensor], name: str) -> bool:
        """True for cuda, and for meta where it comes from one of our tensors, which are meta tensors to torch."""
        kind = torch.device(target).type
        ours = bool(here) or name == "scalar_tensor" or (name == "_to_copy" and not leaves[0].is_meta)
        return kind == "cuda" or (kind == "meta" and ours)

    def _copy(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], to_device: bool) -> Any:
        target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
        from_device = isinstance(source, CudaTensor)
        if target is not None:
            to_device = isinstance(target, CudaTensor)
        values, places = {key: _on_cpu(value) for key, value in kwargs.items()}, _on_cpu(args)
        values.pop("pin_memory", None)
        copied = func(*places, **values)
        if from_device and to_device:
            self.kernels[name] += 1
            self._record(func, places, values, copied)
        else:
            self._count_host(self.uploads if to_device else self.syncs, f"copy {list(source.shape)}")
        if target is not None:
            return target
        if from_device != to_device:
            copied = copied.clone()  # another memory, as between two devices
        return CudaTensor(copied) if to_device else copied

    def _count_host(self, counts: Counter[str], what: str) -> None:
        """Count what the host does beside starting kernels. A graph cannot hold it."""
        if self.recorded is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({what})")
        counts[what] += 1

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add a kernel to the graph that is being captured."""
        if self.recorded is None:
            return
        if func._schema.is_mutable:
            self.recorded.append(lambda: func(*args, **kwargs))
            return

        def again() -> None:
            for old, new in zip(_tensors([result]), _tensors([func(*args, **kwargs)]), strict=True):
                old.copy_(new)

        self.recorded.append(again)

    def _check_devices(self, name: str, args: Any, there: list[Tensor]) -> None:
        """Refuse tensors on the CPU beside some on the device, except for numbers, and for indices."""
        if name in _SCALES_ON_CPU:
            if not isinstance(args[0], CudaTensor):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            indices = _tensors(args[1])
            for index in indices:
                if not isinstance(index, CudaTensor):
                    self._count_host(self.uploads, f"index {list(index.shape)}")
            there = [leaf for leaf in there if not any(leaf is index for index in indices)]
        numbers_alone = name in ("cat", "stack", "bmm", "mm", "embedding", "gather", "index_select", "scatter")
        if any(leaf.dim() or numbers_alone for leaf in there):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({name})")

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention`, as one kernel."""
        tensors = [t for t in (query, key, value, attn_mask) if t is not None]
        self._check_devices("attention", (), [t for t in tensors if not isinstance(t, CudaTensor)])
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise RuntimeError("the numbers of heads differ")
        self.kernels["attention" + (" with a mask" if attn_mask is not None else "")] += 1
        with torch.no_grad(), torch._C._DisableTorchDispatch():
            q, k, v, mask = (None if t is None else t.values for t in (query, key, value, attn_mask))
            return CudaTensor(
                nn.functional.scaled_dot_product_attention(
                    q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
            )

    def _flash(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        """torch's flash attention by its definition. It refuses what the CUDA kernel refuses."""
        _, H, N, D = query.shape
        K, M = key.shape[1:3]
        if not (query.dtype in _HALF and query.dtype == key.dtype == value.dtype):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if D > 256 or D % 8 or key.shape != value.shape or key.shape[3] != D or H % K:
            raise RuntimeError(f"FlashAttention does not take {list(query.shape)} with {list(key.shape)}")
        if is_causal and N != M:
            raise RuntimeError("which keys a query sees depends on the release of torch where N and M differ")
        if any(t.values.stride(-1) != 1 for t in (query, key, value)):  # type: ignore[attr-defined]
            raise RuntimeError("Input tensor must have contiguous last dimension")
        self.kernels["flash attention"] += 1
        q, k, v = (t.values.double() for t in (query, key, value))  # type: ignore[attr-defined]
        k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
        if is_causal:
            scores.masked_fill_(~torch.ones(N, M, dtype=torch.bool).tril(), -math.inf)
        out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1).float()
        return CudaTensor(out.to(query.dtype)), CudaTensor(lse), None, None, N, M, None, None, None


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among the arguments of an operation, or in lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += _tensors(value)
    return found


def _on_cpu(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.values
    if type(value) in (list, tuple):
        return type(value)([_on_cpu(each) for each in value])
    return CPU if isinstance(value, torch.device) else value


def _on_device(result: Any) -> Any:
    if type(result) in (list, tuple):
        return type(result)([_on_device(each) for each in result])
    return CudaTensor(result) if isinstance(result, Tensor) else result


@functools.cache
def _known(func: Any) -> tuple[str, bool, bool]:
    """The name of an operation, whether it is made of others, and whether its result is a view."""
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    returned = [argument.alias_info for argument in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return func._schema.name.split("::")[1], is_composite, is_view


_active: list[PretendCuda] = []


def _running() -> PretendCuda:
    return _active[-1]


@contextlib.contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """A machine with one GPU. Use `move` to put a model there, and `cuda:0` for its device: torch asks a driver for
    the index that `cuda` alone has."""
    torch._C._ensureCUDADeviceGuardSet()
    device = PretendCuda()
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": device.capture,
        "device": device.choose,
        "mem_get_info": lambda *_: (device.free, device.free),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
    }
    with contextlib.ExitStack() as stack:
        for name, function in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.callback(step._side_stream.cache_clear)
        before = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` builds on the CPU, and its copy is seen
        _active.append(device)
        stack.callback(_active.pop)
        stack.enter_context(device)
        yield device


class _Stream:
    """A stream of the device, which has one order of everything."""

    def wait_stream(self, _: _Stream) -> None:
        pass


class _Graph:
    """A graph, whose kernels the device records."""

    def __init__(self) -> None:
        self.kernels: list[Callable[[], object]] = []

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch():
            for kernel in self.kernels:
                kernel()


class _Generator(torch.Generator):
    """A generator for any device, on the CPU."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, device=CPU)


def move(model: nn.Module) -> nn.Module:
    """Put the weights and buffers of a model onto the pretend device. Weights that are shared stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in moved:
                    moved[id(weight)] = nn.Parameter(CudaTensor(weight.detach()), requires_grad=False)
                module._parameters[name] = moved[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else CudaTensor(buffer)
    return model
