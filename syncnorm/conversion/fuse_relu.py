"""Batch norm, shortcut and ReLU of a block in one call: found by tracing the block, and put in by a change of class.

A block is a module whose forward calls synced layers of its own. Traced by ``torch.fx`` with its children as leaves,
its forward is a list of calls; where a synced layer's output goes into a ReLU and nowhere else, at once or after an
addition, the three become one call of the layer. The block's class changes to one with that forward: children,
parameters, attributes and hooks stay, and changing it back is all that there is to undo.
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from syncnorm.conversion.fx_trace import NotTraceable, graph_of
from syncnorm.errors import InputError
from syncnorm.modules import SyncMixin

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADDITIONS = (operator.add, torch.add)
_IN_PLACE = (operator.iadd,)
# What these return is memory of its own, which nothing but its reader can write to.
_FRESH = (_ConvNd, nn.Linear, SyncMixin)


class Fused:
    """Marks the made class of a block whose norms are fused; ``_unfused_class`` is the one it had."""

    _unfused_class: type
    _fused_layers: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the class it had: a copy computes the same, unfused, until ``convert(fuse=True)``."""
        made = type(self)
        self.__class__ = self._unfused_class
        try:
            rebuild, args, *rest = self.__reduce_ex__(protocol)
        finally:
            self.__class__ = made
        return _rebuild, (rebuild, *args), *rest  # pickle would take offence at an object that is not of that class


def _rebuild(rebuild: Callable[..., Any], *args: Any) -> Any:
    return rebuild(*args)


def fuse(model: nn.Module) -> None:
    """Fuses what it can in each block of ``model``, in place; any other block stays as it is."""
    for block in model.modules():
        if isinstance(block, Fused | SyncMixin) or not any(_is_plain_layer(c) for c in block.children()):
            continue
        with suppress(NotTraceable):
            _fuse_block(block)


def unfuse(model: nn.Module) -> None:
    """Gives each block the class that it had.

    Raises:
        InputError: a block's class was made from a fused one; nothing was changed.
    """
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, Fused)}
    for name, block in blocks.items():
        if "_unfused_class" not in vars(type(block)):
            raise InputError(
                f"{name or '(model)'} is a {type(block).__name__}, made from a fused one (by FSDP's fully_shard, or "
                f"as a subclass): revert or convert before that"
            )
    for block in blocks.values():
        block.__class__ = block._unfused_class


def fused_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that are called together with their ReLU."""
    blocks = [block for block in model.modules() if isinstance(block, Fused)]
    return {block.get_submodule(name) for block in blocks for name in block._fused_layers}


def _fuse_block(block: nn.Module) -> None:
    graph = graph_of(block)
    modules = dict(block.named_modules())
    fused = tuple(n for n in (_fuse_node(graph, node, modules) for node in list(graph.nodes)) if n is not None)
    if not fused:
        return
    graph.lint()
    cls = type(block)
    namespace = {
        "forward": _compiled(graph, block),
        "_unfused_class": cls,
        "_fused_layers": fused,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    block.__class__ = type(f"Fused{cls.__name__}", (Fused, cls), namespace)


def _fuse_node(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Puts one call in the place of ``norm`` and what follows it; the layer's name, or None where that is no ReLU."""
    if norm.op != "call_module" or not _is_plain_layer(modules[str(norm.target)]) or len(norm.all_input_nodes) != 1:
        return None
    relu, addition, residual = _only_user(norm), None, None
    if relu is not None and (operands := _added(relu)) is not None:
        others = [o for o in operands if o is not norm]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or (_is_in_place(relu) and operands[0] is not norm):
            return None
        residual, addition, relu = others[0], relu, _only_user(relu)
    if relu is None or not _is_relu(relu, modules) or not _may_move(norm, addition, relu, modules):
        return None
    with graph.inserting_before(relu):
        call = graph.call_module(str(norm.target), norm.args, {"residual": residual, "relu": True})
    relu.replace_all_uses_with(call)
    for node in (relu, addition, norm):
        if node is not None:
            graph.erase_node(node)
    return str(norm.target)


def _may_move(norm: fx.Node, addition: fx.Node | None, relu: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether what the norm reads, and then the addition, is sure to be the same when the ReLU comes."""
    if addition is not None and addition.next is not relu:
        return False
    if norm.next in (addition, relu):
        return True
    read, between = norm.all_input_nodes[0], norm.next
    if read.op != "call_module" or not isinstance(modules[str(read.target)], _FRESH) or len(read.users) > 1:
        return False
    while between not in (addition, relu):
        # A layer that is called twice updates its statistics in the order of its calls.
        if between.op == "call_module" and modules[str(norm.target)] in modules[str(between.target)].modules():
            return False
        between = between.next
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _added(node: fx.Node) -> tuple[Any, ...] | None:
    """The two operands of an addition."""
    function = node.op == "call_function" and node.target in (*_ADDITIONS, *_IN_PLACE)
    method = node.op == "call_method" and node.target in ("add", "add_")
    return node.args if (function or method) and len(node.args) == 2 and not node.kwargs else None


def _is_in_place(node: fx.Node) -> bool:
    return node.target in _IN_PLACE or node.target == "add_"


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and _runs_as_written(module)
    return node.target in _RELU_FUNCTIONS if node.op == "call_function" else node.target in ("relu", "relu_")


def _is_plain_layer(module: nn.Module) -> bool:
    """A synced layer whose forward is that of the mix-in, with no hook that would see what is in between."""
    return isinstance(module, SyncMixin) and type(module).forward is SyncMixin.forward and _runs_as_written(module)


def _runs_as_written(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _compiled(graph: fx.Graph, block: nn.Module) -> Callable[..., Any]:
    """The forward that the graph spells, as a function of ``self``."""
    return fx.GraphModule(block, graph).forward.__func__  # type: ignore[attr-defined,no-any-return]
