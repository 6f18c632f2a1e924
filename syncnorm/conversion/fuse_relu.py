"""Fuses the batch norm, the addition of a shortcut and the ReLU of a block into one call of the layer.

A block is a module with synced layers among its children. ``torch.fx`` traces its forward with the children as
leaves, which gives a list of calls. If the output of a synced layer is used only by a ReLU, directly or through an
addition, the two or three calls become one call of the layer. The block's class is then replaced by one with that
forward: children, parameters, attributes and hooks stay, and setting the old class undoes it.
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from syncnorm.conversion.classes import reduce_as
from syncnorm.conversion.fx_trace import NotTraceable, trace_block
from syncnorm.errors import InputError
from syncnorm.modules import SyncMixin

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADDITIONS = (operator.add, torch.add)
_IN_PLACE_ADDITIONS = (operator.iadd,)
# Modules that return a new tensor, which only the calls that use it can write to.
_RETURN_NEW_TENSOR = (_ConvNd, nn.Linear, SyncMixin)


class Fused:
    """Mixed into the class of a block with fused layers; ``_unfused_class`` is the block's original class."""

    _unfused_class: type
    _fused_layers: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an instance of the original class: a copy computes the same, unfused until ``convert(fuse=True)``."""
        rebuild, args, *rest = reduce_as(self, self._unfused_class, protocol)
        # Indirectly, because pickle checks that the object is of the class that ``copyreg.__newobj__`` creates.
        return _rebuild, (rebuild, *args), *rest


def _rebuild(rebuild: Callable[..., Any], *args: Any) -> Any:
    return rebuild(*args)


def fuse(model: nn.Module) -> None:
    """Fuses the layers of each block of ``model``, in place, if ``torch.fx`` can trace the block."""
    for block in model.modules():
        if isinstance(block, Fused | SyncMixin) or not any(_is_plain_layer(c) for c in block.children()):
            continue
        with suppress(NotTraceable):
            _fuse_block(block)


def unfuse(model: nn.Module) -> None:
    """Restores the original class of each fused block, and the separate operations in graphs of ``torch.fx``.

    Raises:
        InputError: the class of a block is derived from that of a fused block; nothing was changed.
    """
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, Fused)}
    for name, block in blocks.items():
        if "_unfused_class" not in vars(type(block)):
            raise InputError(
                f"{name or '(model)'} is a {type(block).__name__}, which is derived from the class of a fused block "
                f"(by FSDP's fully_shard or by subclassing): revert or convert before that"
            )
    for block in blocks.values():
        block.__class__ = block._unfused_class
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            _unfuse_graph(module)


def fused_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that are fused with their ReLU."""
    blocks = [block for block in model.modules() if isinstance(block, Fused)]
    return {block.get_submodule(name) for block in blocks for name in block._fused_layers}


def _unfuse_graph(module: fx.GraphModule) -> None:
    """Undoes fusion in the graph of a model that was traced while its blocks were fused."""
    graph = module.graph
    for node in list(graph.nodes):
        fused = node.op == "call_module" and node.kwargs.keys() & {"residual", "relu"}
        if not fused or not isinstance(module.get_submodule(str(node.target)), SyncMixin):
            continue
        kwargs = dict(node.kwargs)
        residual, relu = kwargs.pop("residual", None), kwargs.pop("relu", False)
        node.kwargs, last = kwargs, node
        users = list(node.users)
        if residual is not None:
            with graph.inserting_after(last):
                last = graph.call_function(operator.add, (last, residual))
        if relu:
            with graph.inserting_after(last):
                last = graph.call_function(F.relu, (last,))
        for user in users:
            user.replace_input_with(node, last)
    module.recompile()


def _fuse_block(block: nn.Module) -> None:
    graph = trace_block(block)
    modules = dict(block.named_modules())
    fused = tuple(n for n in (_fuse_node(graph, node, modules) for node in list(graph.nodes)) if n is not None)
    if not fused:
        return
    graph.lint()
    cls = type(block)
    namespace = {
        "forward": _forward_of(graph, block),
        "_unfused_class": cls,
        "_fused_layers": fused,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    block.__class__ = type(f"Fused{cls.__name__}", (Fused, cls), namespace)


def _fuse_node(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Replaces ``norm``, the addition and the ReLU after it by one call; returns the layer's name if it did."""
    if norm.op != "call_module" or not _is_plain_layer(modules[str(norm.target)]) or len(norm.all_input_nodes) != 1:
        return None
    relu, addition, residual = _only_user(norm), None, None
    if relu is not None and (operands := _addition_operands(relu)) is not None:
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
    """Whether the norm and the addition read the same values if they are executed at the position of the ReLU."""
    if addition is not None and addition.next is not relu:
        return False
    if norm.next in (addition, relu):
        return True
    source, between = norm.all_input_nodes[0], norm.next
    if source.op != "call_module" or not isinstance(modules[str(source.target)], _RETURN_NEW_TENSOR):
        return False
    if len(source.users) > 1:
        return False
    while between not in (addition, relu):
        # A layer that is called twice must update its statistics in the order of its calls.
        if between.op == "call_module" and modules[str(norm.target)] in modules[str(between.target)].modules():
            return False
        between = between.next
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _addition_operands(node: fx.Node) -> tuple[Any, ...] | None:
    """The two operands if ``node`` is an addition, otherwise None."""
    function = node.op == "call_function" and node.target in (*_ADDITIONS, *_IN_PLACE_ADDITIONS)
    method = node.op == "call_method" and node.target in ("add", "add_")
    return node.args if (function or method) and len(node.args) == 2 and not node.kwargs else None


def _is_in_place(node: fx.Node) -> bool:
    return node.target in _IN_PLACE_ADDITIONS or node.target == "add_"


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and _runs_class_forward(module)
    return node.target in _RELU_FUNCTIONS if node.op == "call_function" else node.target in ("relu", "relu_")


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether it is a synced layer with the mix-in's forward, and without hooks that would see the unfused output."""
    return isinstance(module, SyncMixin) and type(module).forward is SyncMixin.forward and _runs_class_forward(module)


def _runs_class_forward(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _forward_of(graph: fx.Graph, block: nn.Module) -> Callable[..., Any]:
    """A forward that executes ``graph``, as a function of ``self``."""
    return fx.GraphModule(block, graph).forward.__func__  # type: ignore[attr-defined,no-any-return]  # a bound method
