"""What torch keeps for each thread, taken over by a thread that continues the work of another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import overrides
from torch.utils import _python_dispatch

from syncnorm._torch_versions import top_saved_tensors_hooks


class ThreadState:
    """The state of the thread that creates it.

    It has the modes of autograd and autocast, the innermost hooks of saved tensors, the modes of ``torch.overrides``
    and ``torch.utils._python_dispatch`` (such as a default device, or a counter of operations), and the CUDA stream.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            torch.autocast(device, torch.get_autocast_dtype(device), enabled, torch.is_autocast_cache_enabled())
            for device in _device_types()
            if (enabled := torch.is_autocast_enabled(device))
        ]
        self._hooks = top_saved_tensors_hooks()
        self._function_modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """A context of another thread, in which this state is that of the thread."""
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for autocast in self._autocast:
                stack.enter_context(autocast)
            if self._hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._hooks))
            # Not entered, which would change the modes themselves: they are in use in the other thread.
            for function_mode in self._function_modes:
                overrides._push_mode(function_mode)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                stack.callback(overrides._pop_mode)
            for dispatch_mode in self._dispatch_modes:
                _python_dispatch._push_mode(dispatch_mode)
                stack.callback(_python_dispatch._pop_mode)
            yield


class RandomStream:
    """States of torch's generators that a thread sets when it continues: CPU and, if in use, the CUDA device."""

    def __init__(self) -> None:
        self.note()

    def note(self) -> None:
        """Takes the present states."""
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def restore(self) -> None:
        """Sets the generators to these states."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    @classmethod
    def branched(cls, count: int) -> list[RandomStream]:
        """``count`` streams of different numbers; the generators move on by as many draws."""
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        seeds = torch.randint(2**62, (count,), device="cpu").tolist()
        own, streams = cls(), []
        for seed in seeds:
            for generator in generators:  # not torch.manual_seed, which takes 300 us
                generator.manual_seed(seed)
            streams.append(cls())
        own.restore()
        return streams


def _device_types() -> list[str]:
    if not torch.accelerator.is_available():  # 2.6 raises where there is none
        return ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None or accelerator.type == "cpu" else ["cpu", accelerator.type]
