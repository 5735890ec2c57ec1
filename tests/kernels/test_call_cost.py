"""What a call costs in Python, against the call of an operator that does nothing; and what is kept between calls.

Nothing is computed: Triton compiles for a GPU that is not there, and a launch ends where the driver would be called.
"""

from __future__ import annotations

import time

import pytest
import torch
import triton_builds
from forks import Fork, together

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget

from hybridzoo.kernels import na2d, na2d_packed, routed_attention2d, tuning
from hybridzoo.kernels.neighborhood import triton_impl
from hybridzoo.kernels.routed import triton_impl as routed_impl

CALLS = 10  # that are timed together
IMPORTED = triton_impl, routed_impl  # before the interpreter is said to run
LAUNCHED: list[tuple] = []  # what each launch was given


class Driver:
    """Of a GPU that is not there."""

    class utils:
        load_binary = staticmethod(lambda *args: (1, 2, 32, 0, 1024))
        unload_module = staticmethod(lambda module: None)
        get_device_properties = staticmethod(lambda device: dict(max_shared_mem=232448))

    get_current_device = get_current_stream = staticmethod(lambda *args: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    launcher_cls = staticmethod(lambda source, metadata: lambda *args: LAUNCHED.append(args[9:]))


def cost(call):
    """Seconds: the least of many."""
    least = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        least = min(least, time.perf_counter() - start)
    return least


def print_costs():
    """Name, and how many calls of an empty operator a call costs: without a gradient, and with one."""
    torch.set_num_threads(1)
    tuning.forget()
    triton.runtime.driver.set_active(Driver())
    library = torch.library.Library("empty_test", "FRAGMENT")
    library.define("nothing(Tensor x) -> Tensor")
    library.impl("nothing", lambda x: x.new_empty(x.shape), "CompositeExplicitAutograd")
    nothing = torch.ops.empty_test.nothing.default

    qkv = torch.randn(2, 14, 14, 3, 2, 32, dtype=torch.float16)
    rpb, routes = torch.randn(2, 13, 13), torch.randint(0, 49, (2, 49, 4))
    calls = {
        "na2d": lambda q, k, v: na2d(q, k, v, 7, rpb=rpb, impl="triton"),
        "na2d_packed": lambda q, k, v: na2d_packed(qkv, 7, rpb=rpb, impl="triton"),
        "routed_attention2d": lambda q, k, v: routed_attention2d(q, k, v, routes, 7, impl="triton"),
    }
    for name, call in calls.items():
        found = []
        for differentiable in (False, True):
            qkv.requires_grad_(differentiable)
            maps = qkv.unbind(3)
            found.append(cost(lambda call=call, maps=maps: call(*maps)) / cost(lambda: nothing(qkv)))
        qkv.requires_grad_(False)
        print(name, *found)
    assert_launches_are_those_of_triton(qkv, rpb)


def assert_launches_are_those_of_triton(qkv, rpb):
    """What is called at once is what Triton would have found: other code where memory begins elsewhere."""
    LAUNCHED.clear()
    elsewhere = torch.randn(qkv.numel() + 1, dtype=torch.float16)[1:].view(qkv.shape)
    for given in (qkv, elsewhere, qkv.bfloat16(), qkv):
        maps = triton_impl.Maps(*given.unbind(3))
        out, lse = torch.empty(maps.query.shape, dtype=given.dtype), torch.empty(maps.query.shape[:4])
        launch = triton_impl.forward_launch(maps, rpb, out, lse, triton_impl.Window((7, 7), (1, 1), 0.3))
        launch.run()
        launch.run()
        last, arguments = LAUNCHED[-1], launch.arguments.values()
        assert [type(a) for a in last] == [type(a) for a in arguments]
        assert all(a is b for a, b in zip(last, arguments, strict=True) if isinstance(a, torch.Tensor))
        assert len(last) == len(LAUNCHED[-2]) == len(launch.recipe.kernel.arg_names)
    assert len(LAUNCHED) == 8
    assert len(set(map(id, launch.recipe.compiled.values()))) == len(launch.recipe.compiled) == 3


@pytest.mark.alone
def test_a_call_costs_little_more_than_an_empty_operator(tmp_path):
    """Measured: 11 to 19 times without a gradient, 14 to 20 with one; before, `na2d` took 21 and 31.

    In a fork: Triton is given another driver there, and told that the interpreter runs, of which only the checks know.
    """
    triton_builds.require_compiler(90)
    (printed,) = together(Fork(print_costs, tmp_path / "costs", TRITON_INTERPRET="1"))
    costs = {name: tuple(map(float, rest)) for name, *rest in map(str.split, printed.splitlines())}
    assert set(costs) == {"na2d", "na2d_packed", "routed_attention2d"}
    for name, (plain, differentiable) in costs.items():
        assert plain <= 25, (name, costs)
        assert differentiable <= 28, (name, costs)
