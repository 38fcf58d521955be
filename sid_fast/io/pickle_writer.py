"""Write networks as pickles that upstream's tools load, with the source of their classes inside.

Upstream rebuilds each module by torch_utils.persistence._reconstruct_persistent_obj(meta): it runs
meta["module_src"] as a module, takes the class meta["class_name"] from it, and restores
meta["state"] without calling the constructor.
"""

import pickle
from typing import Any, BinaryIO, ClassVar

from torch import nn

# Of a module's attributes, PyTorch creates all but these anew; they differ between its versions.
_STATE = {"training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}
_CREATED_ANEW = set(vars(nn.Module())) - _STATE


def write_pickle(file: BinaryIO, net: nn.Module, source: str, arguments: dict[str, Any]) -> None:
    """Write {"ema": net}.

    Args:
        file: where to write.
        net: the network; its classes, and those of its modules, restore a state that lacks what
            PyTorch adds to every module.
        source: Python source of all these classes.
        arguments: of the network's constructor, plain values.
    """
    _Writer(file, net, source, arguments).dump({"ema": net})


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    raise NotImplementedError("the pickle names upstream's function")


_Base: Any = pickle._Pickler  # the C pickler would import the function that the file names


class _Writer(_Base):
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO, net: nn.Module, source: str, arguments: dict[str, Any]):
        super().__init__(file, protocol=4)  # the first for more than 4 GB
        self.net, self.source, self.arguments = net, source, arguments

    def reducer_override(self, value: Any) -> Any:
        """Return a module's meta as the argument of upstream's function; others as usual."""
        if not isinstance(value, nn.Module):
            return NotImplemented
        state = {k: v for k, v in vars(value).items() if k not in _CREATED_ANEW}
        state |= {"_init_args": (), "_init_kwargs": self.arguments if value is self.net else {}}
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": type(value).__name__,
            "state": state,
        }
        return _reconstruct_persistent_obj, (meta,)

    def save_function(self, value: Any) -> None:
        """Write the name of upstream's function where ours stands for it."""
        if value is not _reconstruct_persistent_obj:
            return self.save_global(value)
        self.save("torch_utils.persistence")
        self.save("_reconstruct_persistent_obj")
        self.write(pickle.STACK_GLOBAL)
        self.memoize(value)

    dispatch[type(write_pickle)] = save_function
