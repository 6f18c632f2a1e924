"""Folds batch norms into the convolution or linear layer before them, for inference."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from syncnorm.conversion.classes import has_own_forward
from syncnorm.conversion.convert import replace_modules, revert
from syncnorm.errors import InputError
from syncnorm.layer.checks import shape

M = TypeVar("M", bound=nn.Module)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Exact types only: folding would ignore how a subclass or a parametrization changes the weight.
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def fold(model: M) -> M:
    """A copy of ``model`` for inference, with batch norms folded into the convolution or linear layer before them.

    In evaluation a batch norm is an affine map per channel, which the weight and bias of the layer before it can
    absorb. The copy is in evaluation mode, its synced layers are plain batch norms, and folded norms are
    ``nn.Identity``. Outputs differ by rounding. Do not train the copy.

    A ``torch.fx`` trace of the model finds the pairs: only the norm uses the layer's output, and both run once. If
    the model cannot be traced, only neighbors in an ``nn.Sequential`` are folded. Not folded are norms without
    running statistics, with their own forward (such as one with an activation) or with hooks; transposed convolutions
    with several groups; convolutions and linear layers with parametrizations or hooks.

    The channels of a batch norm are dimension 1, those of a linear layer the last dimension: a folded linear layer
    therefore raises an ``InputError`` for input with more than 2 dimensions.

    Args:
        model: stays unchanged; synced or not, in any mode.

    Returns:
        A model of the same class.

    Warns:
        UserWarning: the model could not be traced.

    Collective: none.

    Example:
        >>> fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    folded = revert(copy.deepcopy(model)).eval()
    try:
        graph = _Tracer().trace(folded)
    except Exception as error:  # code that a tracer cannot follow can fail with any exception
        warnings.warn(
            f"syncnorm.fold could not trace {type(model).__name__} with torch.fx ({error}), so it folds only "
            f"batch norms that directly follow their layer in an nn.Sequential",
            stacklevel=2,
        )
        pairs = list(_pairs_in_sequentials(folded))
    else:
        pairs = list(_pairs_in_graph(folded, graph))
    replaced: dict[nn.Module, nn.Module] = {}
    for layer, norm in pairs:
        if _can_fold(layer, norm):
            replaced |= {layer: _fold_pair(layer, norm), norm: nn.Identity().eval()}
    replace_modules(folded, replaced)
    return folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Batch norms of any library are leaves."""
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _pairs_in_graph(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # Folding would change a weight that the model also uses outside of its layer.
    used = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = {str(before.target), str(node.target)}
        if calls[before.target] == calls[node.target] == 1 and not names & used:
            yield model.get_submodule(str(before.target)), model.get_submodule(str(node.target))


def _pairs_in_sequentials(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    places = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from (pair for pair in pairwise(module) if places[pair[0]] == places[pair[1]] == 1)


def _can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    if type(layer) not in _FOLDABLE or not isinstance(norm, _BatchNorm) or has_own_forward(type(norm)):
        return False
    if any(vars(m).get(kind) for m in (layer, norm) for kind in ("_forward_hooks", "_forward_pre_hooks", "forward")):
        return False
    # For a transposed convolution these are the channels of one group, so that with several groups it is not folded.
    channels = layer.weight.size(1 if isinstance(layer, _TRANSPOSED) else 0)  # type: ignore[operator]  # _FOLDABLE have a weight
    return norm.track_running_stats and norm.running_mean is not None and norm.running_mean.numel() == channels


def _fold_pair(layer: Any, norm: Any) -> nn.Module:
    """A new layer that computes ``norm(layer(x))``."""
    if norm.weight is None:  # fuse_linear_bn_eval expects one
        norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))
    if norm.bias is None:
        norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
    if not isinstance(layer, nn.Linear):
        convolution: nn.Module = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))
        return convolution
    linear = fuse_linear_bn_eval(layer, norm)
    linear.register_forward_pre_hook(_check_two_dimensional)
    return linear


def _check_two_dimensional(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if args[0].dim() > 2:
        raise InputError(
            f"the batch norm after this linear layer was folded into it, which is exact only for input of shape "
            f"(batch, features); got {shape(args[0])}"
        )
