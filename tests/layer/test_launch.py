"""How Triton's kernels are launched, on a stand-in GPU, and what happens where they cannot be."""

import itertools
import time
import warnings

import pytest
import torch
from versions import why_no_compiler

if reason := why_no_compiler():
    pytest.skip(reason, allow_module_level=True)
import triton
import triton.language as tl
from stand_in_gpu import StandInGpu, on_device, stand_in_gpu
from triton.runtime.build import compile_module_from_src
from triton.runtime.jit import JITFunction

from syncnorm.layer.kernels import launch as launching
from syncnorm.layer.kernels import triton_backward, triton_forward
from syncnorm.layer.kernels.launch import TritonFailed, launch, passes_available, unavailable

META = torch.device("meta")


@triton.jit(do_not_specialize=["number"])
def _scale(x, other, n, m, factor, flag, tile: tl.constexpr, relu: tl.constexpr, number):
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    value = tl.load(x + at, mask=at < n, other=0.0) * factor
    if other is not None:
        value += tl.load(other + at, mask=at < m, other=0.0)
    if relu:
        value = tl.where(value < 0, 0.0, value)
    if flag:
        value += number
    tl.store(x + at, value.to(x.dtype.element_ty), mask=at < n)


@triton.jit
def _does_not_compile(x, tile: tl.constexpr):
    tl.store(x + tl.arange(0, tile), tl.load(x).no_such_method())


@triton.jit
def _constexpr_first(tile: tl.constexpr, x):
    tl.store(x + tl.arange(0, tile), 0.0)


@pytest.fixture
def gpu():
    with stand_in_gpu() as gpu:
        yield gpu


def arguments(gpu: StandInGpu, **other: object) -> tuple[object, ...]:
    """Of ``_scale``, with some of them replaced."""
    x = on_device(gpu.device, 64)
    usual = {"x": x, "other": None, "n": 64, "m": 3, "factor": 0.5, "flag": False, "tile": 64, "relu": True}
    usual["number"] = 7
    return tuple((usual | other).values())


def test_arguments_grid_stream_and_device_are_those_of_triton(gpu):
    args = arguments(gpu)
    _scale[3, 2](*args)
    for _ in range(3):
        launch(_scale, (3, 2), *args)
    by_triton, *ours = gpu.launches
    assert by_triton.grid == (3, 2, 1)
    assert [each for each in ours if each != by_triton] == []
    assert by_triton.args[2:] == (64, 3, 0.5, False, 64, True, 7)


def test_from_the_second_launch_on_triton_looks_for_nothing(gpu, monkeypatch):
    args = arguments(gpu)
    launch(_scale, (1, 1), *args)
    monkeypatch.setattr(JITFunction, "run", None)
    launch(_scale, (2, 1), *args)
    launch(_scale, (1, 3), *arguments(gpu, x=on_device(gpu.device, 1), n=96, m=35, factor=-0.5, number=16))
    assert [each.grid for each in gpu.launches] == [(1, 1, 1), (2, 1, 1), (1, 3, 1)]
    assert gpu.launches[-1].args[2:5] == (96, 35, -0.5)


INTEGERS = [
    0,
    1,
    -1,
    2,
    16,
    17,
    31,
    48,
    2**31 - 1,
    2**31 - 16,
    2**31,
    2**31 + 1,
    -(2**31),
    -(2**31) - 1,
    2**40,
    2**63,
]

# Of one parameter: values that Triton does not treat all alike.
KINDS = {
    "x": [{"dtype": dtype, "address": at} for dtype in (torch.float32, torch.bfloat16) for at in (0, 4, 8, 32)],
    "other": [None, {}, {"address": 24}, {"dtype": torch.float16}],
    "n": INTEGERS,
    "number": INTEGERS,
    "m": [1, True, False, 1.0, 7, 32],
    "factor": [0.5, 1.0, 16.0, 3, 16, 1, None, True],
    "flag": [True, False, 1, 0, 16],
    "tile": [16, 64],
    "relu": [True, False, 0, 3, None, "text"],
}


def kinds(gpu: StandInGpu, name: str) -> list[tuple[object, ...]]:
    def value(found: object) -> object:
        return on_device(gpu.device, 64, **found) if isinstance(found, dict) else found

    return [arguments(gpu, **{name: value(found)}) for found in KINDS[name]]


@pytest.mark.parametrize("name", KINDS)
def test_keys_distinguish_what_triton_distinguishes(gpu, name):
    """A key that was equal for arguments that Triton compiles differently would compute wrong numbers."""
    binder = _scale.device_caches[gpu.device][4]
    cases = []
    for args in kinds(gpu, name):
        types = tuple(map(type, args))
        key = launching._key_function(_scale, types)
        assert key is not None
        cases.append(((types, key(*args)), [(kind, type(value), value) for kind, value in binder(*args)[1]]))
    alike = 0
    for (key, kind), (other_key, other_kind) in itertools.combinations(cases, 2):
        assert key != other_key or kind == other_kind
        alike += key == other_key
    assert alike > 0 or name in ("other", "tile", "relu", "flag", "m", "factor")


@pytest.mark.parametrize("name", ["x", "other", "n", "relu", "tile", "number"])
def test_each_kind_of_argument_runs_the_form_that_triton_would_run(gpu, name):
    for args in (*kinds(gpu, name), *reversed(kinds(gpu, name))):
        if 2**63 in (args[2], args[-1]) or args[-2] == "text":
            continue  # for Triton's binder alone
        gpu.launches.clear()
        launch(_scale, (1, 1), *args)
        launch(_scale, (1, 1), *args)
        _scale[1, 1](*args)
        assert len({each.kernel.hash for each in gpu.launches}) == 1


def test_a_constexpr_may_be_anywhere(gpu):
    for tile in (16, 32, 16, 32):
        launch(_constexpr_first, (1, 1), tile, on_device(gpu.device, 64))
    assert [each.args[0] for each in gpu.launches] == [16, 32, 16, 32]
    assert gpu.launches[0].kernel is gpu.launches[2].kernel is not gpu.launches[3].kernel
    assert gpu.launches[1].kernel is gpu.launches[3].kernel


def test_an_argument_of_an_unknown_type_is_left_to_triton(gpu):
    class Pointer:
        dtype = torch.float32

        def data_ptr(self) -> int:
            return 0

    for _ in range(2):
        launch(_scale, (1, 1), *arguments(gpu, other=Pointer()))
    assert gpu.names() == ["_scale", "_scale"]


def test_another_version_of_triton_is_left_to_itself(gpu, monkeypatch):
    monkeypatch.setattr(launching, "_KNOWN_VERSIONS", {(2, 0)})
    monkeypatch.setattr(launching, "_forms", {})
    calls, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: (calls.append(1), run(*args, **kwargs))[1])
    for _ in range(3):
        launch(_scale, (1, 1), *arguments(gpu))
    assert len(calls) == len(gpu.launches) == 3


def test_this_version_of_triton_is_known():
    assert launching._known()


def test_hooks_of_profilers_are_called(gpu):
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    launch(_scale, (1, 1), *arguments(gpu))
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        launch(_scale, (1, 1), *arguments(gpu))
    finally:
        hooks.remove(hook)
    launch(_scale, (1, 1), *arguments(gpu))
    assert seen == ["_scale"]
    assert gpu.names() == ["_scale"] * 3


class TestDeviceGuard:
    def test_the_device_of_the_tensors_is_current_for_the_launch(self, gpu):
        for _ in range(2):
            launch(_scale, (1, 1), *arguments(gpu, x=on_device(gpu.other, 64)))
        assert [(each.device, each.stream) for each in gpu.launches] == [(gpu.other, 1000 + gpu.other)] * 2
        assert gpu.selected == [gpu.other, gpu.device] * 2
        assert gpu.current == gpu.device

    def test_it_is_left_alone_if_it_is_current(self, gpu):
        launch(_scale, (1, 1), *arguments(gpu))
        launch(_scale, (1, 1), *arguments(gpu, x=torch.empty(64, device=META)))
        assert gpu.selected == []

    def test_each_device_has_its_own_form(self, gpu):
        launch(_scale, (1, 1), *arguments(gpu))
        launch(_scale, (1, 1), *arguments(gpu, x=on_device(gpu.other, 64)))
        launch(_scale, (1, 1), *arguments(gpu))
        assert [each.device for each in gpu.launches] == [gpu.device, gpu.other, gpu.device]
        assert gpu.loaded == [gpu.device, gpu.other]

    def test_a_failure_restores_the_device(self, gpu):
        gpu.load_error = RuntimeError("no")
        with pytest.warns(UserWarning, match="no"), pytest.raises(TritonFailed):
            launch(_scale, (1, 1), *arguments(gpu, x=on_device(gpu.other, 64)))
        assert gpu.current == gpu.device


class TestFailure:
    def test_the_process_warns_once_and_says_what_to_do(self, gpu):
        gpu.load_error = RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        assert passes_available(META)
        image = "kernel image is invalid"
        with pytest.warns(UserWarning, match=image) as caught, pytest.raises(TritonFailed, match=image) as failed:
            launch(_scale, (1, 1), *arguments(gpu, x=torch.empty(64, device=META)))
        (text,) = [str(each.message) for each in caught]
        assert "torch's own CUDA kernels" in text
        assert "C compiler" in text
        assert failed.value.__cause__ is gpu.load_error
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(TritonFailed):
                launch(_scale, (1, 1), *arguments(gpu, x=on_device(gpu.other, 64)))

    def test_only_the_device_that_failed_is_not_used(self, gpu):
        gpu.load_error = RuntimeError("no")
        with pytest.warns(UserWarning, match=f"cuda:{gpu.other}"), pytest.raises(TritonFailed):
            launch(_scale, (1, 1), *arguments(gpu, x=on_device(gpu.other, 64)))
        assert launching._failures == {gpu.other: "RuntimeError: no"}
        assert passes_available(META)
        with pytest.raises(TritonFailed):
            launch(_scale, (1, 1), *arguments(gpu, x=torch.empty(64, device=META)))
        assert unavailable(META) == "RuntimeError: no"

    def test_a_kernel_that_does_not_compile(self, gpu):
        with pytest.warns(UserWarning, match="no_such_method"), pytest.raises(TritonFailed, match="no_such_method"):
            launch(_does_not_compile, (1, 1), on_device(gpu.device, 64), 64)
        assert gpu.launches == []

    def test_a_c_compiler_that_is_not_there(self, gpu, monkeypatch, tmp_path):
        """The driver of a GPU builds a C module when it is made."""
        monkeypatch.setenv("CC", "/nowhere/cc")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(gpu, "load_binary", lambda *_: compile_module_from_src("int x;", "cuda_utils"))
        with pytest.warns(UserWarning, match="/nowhere/cc"), pytest.raises(TritonFailed, match="/nowhere/cc"):
            launch(_scale, (1, 1), *arguments(gpu))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_driver(self, gpu, monkeypatch):
        monkeypatch.setattr(triton.runtime.driver, "_active", None)
        with pytest.warns(UserWarning, match="active drivers"), pytest.raises(TritonFailed, match="active drivers"):
            launch(_scale, (1, 1), *arguments(gpu))

    @pytest.mark.parametrize("hooked", [False, True])
    def test_an_error_at_a_later_launch_is_the_gpus(self, gpu, hooked, monkeypatch):
        launch(_scale, (1, 1), *arguments(gpu))
        gpu.launch_error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        if hooked:  # Triton launches
            monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [lambda metadata: None])
        with pytest.raises(RuntimeError, match="illegal memory access") as failed:
            launch(_scale, (1, 1), *arguments(gpu))
        assert failed.value is gpu.launch_error
        assert launching._failures == {}


@pytest.mark.parametrize("shape", [(2, 70_000, 2, 2), (4, 70_000), (3, 70_000, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_channels_than_a_grid_has_rows(gpu, shape, channels_last):
    """Along y and z a GPU takes no more than 65,535 programs, which the stand-in refuses as a driver does."""
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    x = torch.empty(shape, device=META).contiguous(memory_format=layout)
    vector, count = torch.empty(shape[1], device=META), torch.empty((), dtype=torch.float64, device=META)
    mismatch = torch.zeros((), dtype=torch.int64)
    row = triton_forward.pack_moments(x, 1e-5, 1.0, None)
    triton_forward.merge(row.expand(8, -1), 1e-5, 1.0, mismatch, 1, None)
    triton_forward.normalize(x, *[vector] * 4, None, None, True, x)
    packed, _ = triton_backward.pack_sums(x, x, *[vector] * 4, None, None, True, 1.0, vector, vector)
    triton_backward.finish(x, x, *[vector] * 4, None, packed, count, True, 8.0, mismatch, 1, x)
    assert len(gpu.launches) == 5


def test_a_grid_that_is_too_large_is_refused(gpu):
    launch(_scale, (1, 1), *arguments(gpu))
    with pytest.raises(RuntimeError, match="a grid of 1, 70000, 1"):
        launch(_scale, (1, 70_000), *arguments(gpu))


def test_devices_without_triton(monkeypatch):
    assert "cpu" in str(unavailable(torch.device("cpu")))
    assert unavailable(torch.device("cuda", 0)) is None
    monkeypatch.setattr(launching, "_installed", lambda: False)
    assert unavailable(torch.device("cuda", 0)) == "Triton is not installed"


def test_an_older_triton_is_not_used(monkeypatch):
    assert passes_available(torch.device("cuda", 0))
    monkeypatch.setattr(launching, "_version", lambda: (3, 4))
    assert unavailable(torch.device("cuda", 0)) == "Triton 3.4 is older than 3.5"


def test_a_launch_costs_the_host_less_than_tritons(gpu):
    """Time of this thread until the GPU's driver would be called; 0.37 to 0.41 of Triton's when it was written."""
    gpu.launcher_cls = lambda *_: lambda *_: None
    args = arguments(gpu, other=on_device(gpu.device, 64))

    def seconds(call, repetitions=300):
        began = time.thread_time()
        for _ in range(repetitions):
            call()
        return time.thread_time() - began

    ours, tritons = (lambda: launch(_scale, (1, 1), *args)), (lambda: _scale[1, 1](*args))
    seconds(ours), seconds(tritons)
    assert min(seconds(ours) for _ in range(9)) < 0.7 * min(seconds(tritons) for _ in range(9))


def test_triton_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("SYNCNORM_TRITON", "0")
    assert unavailable(torch.device("cuda", 0)) == "SYNCNORM_TRITON is 0"
