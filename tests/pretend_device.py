"""A GPU that is not there, for tests on a machine that has only a CPU.

    with pretend_device("cuda") as device:  # or "mps"
        model.to("cuda")
        ...
    device.waits, device.uploads  # how often Python waited for it, or copied something to it

A tensor on it is a Guest: it says that it is on cuda:0 or mps:0, and its numbers lie in a tensor of
the CPU inside. Device sees every operation, raises a DeviceError for what a real device would not
do, and computes the rest on the CPU. It knows nothing of a real one's speed, memory or rounding.
"""

import contextlib
import functools
import re
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
import torch._dynamo  # now, because it looks at functions that are replaced below
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

COPIES = {"aten::copy_", "aten::_to_copy"}  # what may take tensors of two devices
# What hands numbers to Python, or has to know them to tell the size of its result.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
WAITING |= {"aten::_unique2", "aten::unique_dim", "aten::repeat_interleave"}
# Registered for MPS by torch/backends/mps/__init__.py in versions whose list does not say so.
KERNEL_IN_PYTHON = {"aten::native_group_norm_backward"}
# Of what torch.autocast casts on CUDA, the functions that a network like ours may use.
TO_BFLOAT16 = {"conv2d", "linear", "matmul", "__matmul__", "scaled_dot_product_attention"}
TO_FLOAT32 = {"group_norm", "mse_loss", "softmax", "exp", "log", "pow", "erfinv", "cumsum"}


class DeviceError(AssertionError):
    """A real device would have refused this."""


class Guest(torch.Tensor):
    """A tensor that says it is on a device. Its numbers are in `inside`, on the CPU."""

    @staticmethod
    def __new__(cls, inside, place):
        # To autograd it is on meta, which needs no driver. To the dispatcher it is on the device.
        with torch._C._DisableTorchDispatch():
            form = dict(dtype=inside.dtype, device="meta")
            shell = torch.empty_strided(inside.size(), inside.stride(), **form)
            return torch.Tensor._make_subclass(cls, shell, device_for_backend_keys=place)

    def __init__(self, inside, place):
        self.inside, self.place = inside, place

    device = property(lambda self: self.place)
    is_meta = property(lambda self: False)
    is_cuda = property(lambda self: self.place.type == "cuda")
    is_mps = property(lambda self: self.place.type == "mps")

    def tolist(self):  # torch's own refuses subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise DeviceError(f"{func} of a tensor of the device, after it is gone")

    def __reduce_ex__(self, protocol):  # so that torch.save writes the numbers
        return self.inside.__reduce_ex__(protocol)


@functools.cache
def without_mps_kernel():
    """The operations that have kernels, but none for MPS, in the list that torch installs."""
    import torchgen

    listed = Path(torchgen.__file__).with_name("packaged") / "ATen/native/native_functions.yaml"
    found = {}
    for entry in re.split(r"\n(?=- func: )", listed.read_text()):
        name = re.match(r"- func: ([\w.]+)\(", entry)
        keys = re.findall(r"^ {4}([\w, ]+): ", entry.partition("\n  dispatch:\n")[2], re.M)
        served = not keys or re.search(r"\bMPS\b|Composite", " ".join(keys))
        delegate = re.search(r"^  structured_delegate: ([\w.]+)", entry, re.M)
        if name:
            found["aten::" + name[1]] = "aten::" + delegate[1] if delegate else bool(served)
    return {name for name, served in found.items() if found.get(served, served) is False}


class Calls(torch.overrides.TorchFunctionMode):
    """Sees what Python calls, and does what C++ would only do for tensors of a real device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.place = device, device.place

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "to" or "device" in kwargs:
            args, kwargs = each(self.numbered, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == self.place:
            return func(*args, **{**kwargs, "device": "cpu"}).to(self.place)
        if name in TO_BFLOAT16 | TO_FLOAT32 and torch.is_autocast_enabled(self.place.type):
            wanted = torch.bfloat16 if name in TO_BFLOAT16 else torch.float32
            guest = lambda leaf: isinstance(leaf, Guest) and leaf.is_floating_point()
            args, kwargs = each(lambda x: x.to(wanted) if guest(x) else x, (args, kwargs))
        if name == "scaled_dot_product_attention":  # whose kernels choose by the real device
            (q, k, v), scale = args, kwargs.pop("scale", None)
            assert not kwargs, f"{name} with {kwargs} is not built in here"
            return (q * (scale or q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v
        self.device.meta_is_meant = str(kwargs.get("device")) == "meta"
        return func(*args, **kwargs)

    def numbered(self, leaf):
        """mps:0 for mps. Torch would ask the driver."""
        named = isinstance(leaf, (str, torch.device)) and str(leaf).split(":")[0] == self.place.type
        return self.place if named else leaf


class Device(TorchDispatchMode):
    """Sees every operation, in the forward and in the backward pass."""

    def __init__(self, kind, works):
        super().__init__()
        self.place, self.works, self.meta_is_meant = torch.device(kind, 0), works, False
        self.waits, self.uploads, self.dtypes = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, base = dict(kwargs or {}), func._schema.name
        leaves = []
        each(leaves.append, (args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        guests = [tensor for tensor in tensors if isinstance(tensor, Guest)]
        target = kwargs.get("device")
        ours = [self.place.type] + ["meta"] * (not self.meta_is_meant)  # C++ takes a Guest for meta
        to_device = bool(guests) if target is None else target.type in ours
        if target is not None and to_device:
            kwargs["device"] = torch.device("cpu")
        if base == "aten::copy_":
            to_device = isinstance(args[0], Guest)
        if not to_device and not guests:
            return func(*args, **kwargs)
        self.check(func, base, args, tensors, guests)
        self.count(base, args, tensors, guests, to_device)
        out = func(*each(inside, args), **each(inside, kwargs))
        if not to_device:
            return args[0] if base == "aten::copy_" else out
        return return_and_correct_aliasing(func, args, kwargs, each(self.guest, out))

    def guest(self, leaf):
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, Guest):
            return leaf
        if self.place.type == "mps" and leaf.dtype in (torch.float64, torch.complex128):
            raise DeviceError(f"MPS has no {leaf.dtype}")
        return Guest(leaf, self.place)

    def check(self, func, base, args, tensors, guests):
        if not self.works:
            raise RuntimeError("CUDA error: no kernel image is available\nfor this device")
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Guest)]
        if torch.Tag.pointwise in func.tags:  # which takes a number of the CPU, of no dimension
            strangers = [tensor for tensor in strangers if tensor.dim() > 0]
        if guests and strangers and base not in COPIES:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise DeviceError(f"{func}: tensors of the CPU {shapes} among those of {self.place}")
        if self.place.type == "mps" and func.name() in without_mps_kernel() - KERNEL_IN_PYTHON:
            raise DeviceError(f"{func} has no kernel for MPS")

    def count(self, base, args, tensors, guests, to_device):
        masks = (torch.bool, torch.uint8)
        by_mask = base == "aten::index" and any(i.dtype in masks for i in args[1] if i is not None)
        if base in WAITING or by_mask or guests and not to_device:
            self.waits[f"{base} of {tuple(guests[0].shape)}"] += 1
        elif base in COPIES and len(guests) < len(tensors):
            self.uploads[base] += 1
        self.dtypes.update({(base, guest.dtype) for guest in guests})


def inside(leaf):
    return leaf.inside if isinstance(leaf, Guest) else leaf


def each(function, nested):
    """The same lists, tuples and dicts with function(leaf) in place of each leaf."""
    if isinstance(nested, dict):
        return {name: each(function, value) for name, value in nested.items()}
    if isinstance(nested, (list, tuple)) and not isinstance(nested, torch.Size):
        return type(nested)([each(function, value) for value in nested])
    return function(nested)


@contextlib.contextmanager
def pretend_device(kind, capability=(7, 5), works=True):
    """In this block torch has a device of this kind. Without `works` it has no kernels for it."""
    device = Device(kind, works)
    answers = {"backends.mps.is_available": kind == "mps", "cuda.is_available": kind == "cuda"}
    if kind == "cuda":
        answers |= {"cuda.is_initialized": True, "cuda._lazy_init": None, "cuda.device_count": 1}
        for name in ("manual_seed_all", "get_rng_state", "set_rng_state"):  # numbers are the CPU's
            answers["cuda." + name] = None
        answers |= {"cuda.get_device_capability": capability, "cuda.is_bf16_supported": True}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch("torch." + name, lambda *_, answer=answer, **__: answer))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(patch.object(torch.optim.Optimizer, name, lambda self: None))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # by Guests
        stack.enter_context(Calls(device))
        yield stack.enter_context(device)


def what_is_missing():
    """What of torch's insides, on which this stands, this version lacks: -> a sentence, or None."""
    try:
        with pretend_device("cuda"):
            layer = torch.nn.Linear(2, 2).to("cuda")
            layer(torch.ones(1, 2, device="cuda")).sum().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            torch.optim.AdamW(layer.parameters(), fused=True).step()
            assert layer.weight.device.type == "cuda" and layer.weight.tolist()
    except Exception as error:  # AttributeError, TypeError and others
        return f"torch {torch.__version__} lacks what pretend_device needs: {error!r}"
