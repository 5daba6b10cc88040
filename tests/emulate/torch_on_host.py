"""A pytest plugin: PyTorch's own kernels run on the host, on copies of their tensors, for the wheels of
PyPI carry them as machine code alone. Allocation, copies and views stay on the device, and so does what
a test launches by itself, with Triton or another way.

    PYTHONPATH=tests/emulate fathom emulate -- python -m pytest -p torch_on_host TESTS
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Needs no kernel: memory is asked for, or an element fetched.
PLAIN = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::_local_scalar_dense",
         "aten::new_empty_strided", "aten::set_", "aten::record_stream", "aten::is_pinned", "aten::_pin_memory"}


def on_device(x):
    return isinstance(x, torch.Tensor) and x.is_cuda


# The host's generators, by the device's.
GENERATORS = {}


def generator_on_host(generator):
    """Begins anew where the device's was given a seed, which sets its offset to 0."""
    if generator.get_offset() == 0:
        GENERATORS[generator] = torch.Generator().manual_seed(generator.initial_seed())
        generator.set_offset(4)
    return GENERATORS[generator]


class Twins:
    """Copies of tensors on the host; tensors that share memory have copies that share it."""

    def __init__(self):
        self.storages = {}

    def bytes_of(self, tensor):
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

    def of(self, x):
        if isinstance(x, torch.Generator) and x.device.type == "cuda":
            return generator_on_host(x)
        if not on_device(x):
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x
        key = x.untyped_storage().data_ptr()
        if key not in self.storages:
            self.storages[key] = (x, self.bytes_of(x).cpu().untyped_storage())
        twin = torch.empty(0, dtype=x.dtype)
        return twin.set_(self.storages[key][1], x.storage_offset(), x.size(), x.stride())

    def write_back(self, tensor):
        device, host = self.storages[tensor.untyped_storage().data_ptr()]
        self.bytes_of(device).copy_(torch.empty(0, dtype=torch.uint8).set_(host))


def moves_only(name, args, kwargs):
    """A copy between two places of one type, dense in both: no kernel."""
    if name == "aten::copy_":
        to, source = args[:2]
    elif name == "aten::_to_copy":
        to, source = None, args[0]
        if kwargs.get("dtype") not in (None, source.dtype):
            return False
        if kwargs.get("device") in (None, source.device):
            return source.is_contiguous()
    else:
        return False
    same = to is None or (to.dtype == source.dtype and to.shape == source.shape and to.is_contiguous())
    return same and source.is_contiguous()


class OnHost(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        flat = []
        tree_map(flat.append, (args, kwargs))
        cuda = [x for x in flat if on_device(x)]
        made = any(isinstance(x, torch.device) and x.type == "cuda" for x in flat)
        written = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        views = any(r.alias_info for r in schema.returns) and not written
        plain = schema.name in PLAIN or views or moves_only(schema.name, args, kwargs)
        if plain or not (cuda or made):
            return func(*args, **kwargs)
        device = cuda[0].device if cuda else next(x for x in flat if isinstance(x, torch.device) and x.type == "cuda")
        if schema.name == "aten::copy_" and not on_device(args[0]):
            device = torch.device("cpu")
        elif schema.name == "aten::_to_copy" and kwargs.get("device") is not None:
            device = kwargs["device"]
        twins = Twins()
        result = func(*tree_map(twins.of, args), **tree_map(twins.of, kwargs))
        given = {}
        for i in written:
            argument = schema.arguments[i]
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if on_device(x):
                    twins.write_back(x)
            given[tuple(argument.alias_info.before_set)] = value

        def back(x):
            return x.to(device) if isinstance(x, torch.Tensor) and not x.is_cuda else x

        values = list(result) if isinstance(result, tuple) else [result]
        for i, returned in enumerate(schema.returns):
            key = tuple(returned.alias_info.before_set) if returned.alias_info else None
            values[i] = given[key] if key in given else tree_map(back, values[i])
        return tuple(values) if isinstance(result, tuple) else values[0] if schema.returns else None


def pytest_configure():
    OnHost().__enter__()
