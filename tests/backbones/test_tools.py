"""Every family is plain to other people's tools: tracers, hooks, quantizers, adapters, transforms, counters.

What timm's own test-suite asks of every network is here and in the neighbours: `forward`, `backward`, `default_cfgs`,
`forward_features` and `forward_intermediates` (features, too) in `test_contract`, pretrained weights in
`tests/checkpoints`, `forward_fx` and `backward_fx` here. TorchScript is traced here, not compiled (`torch.jit.script`).
"""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from networks import FAMILIES, image, leaders_of, shallow
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

pytestmark = pytest.mark.parametrize("name", leaders_of(FAMILIES))


def test_fx_traces_it_forward_and_backward(name):
    """As timm's own test-suite does: what cannot be traced is registered with timm."""
    model = shallow(name)
    leaves = dict(leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions()))
    train, evaluation = get_graph_node_names(model, tracer_kwargs=leaves | dict(param_shapes_constant=True))
    nodes = dict(train_return_nodes=[train[-1]], eval_return_nodes=[evaluation[-1]])
    traced = create_feature_extractor(model, **nodes, tracer_kwargs=leaves | dict(param_shapes_constant=True))
    with torch.no_grad():
        (out,) = traced.eval()(image()).values()
        assert torch.equal(out, model(image()))
    (out,) = traced.train()(image()).values()
    out.mean().backward()
    assert all(p.grad is not None for p in traced.parameters())
    maps = create_feature_extractor(model, {"stages.0": "fine", "stages.1": "coarse"}, tracer_kwargs=leaves).eval()
    assert set(maps(image())) == {"fine", "coarse"}


def test_jit_trace_with_gradients_uses_only_standard_operators(name):
    model = shallow(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a trace holds for one size, and that tracing is deprecated
        traced = torch.jit.trace(model, image(), check_trace=False)  # which would trace it again
    other = image().flip(0, 3)
    torch.testing.assert_close(traced(other), model(other))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds)
    assert "aten::mT" not in kinds


def test_hooks_fire_on_every_module_with_whole_batches(name):
    model, forward, backward = shallow(name).train(), {}, {}
    for key, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, key=key: forward.update({key: out}))
        if not list(module.children()):
            module.register_full_backward_hook(lambda m, grads, out, key=key: backward.update({key: out[0]}))
    model(image(batch=3).requires_grad_()).square().mean().backward()
    containers = {key for key, module in model.named_modules() if type(module).forward is nn.Module.forward}
    unseen = {key for key, _ in model.named_modules()} - forward.keys() - containers
    assert {key for key in unseen if list(model.get_submodule(key).parameters())} <= loops(model)
    leaves = {key for key, module in model.named_modules() if not list(module.children())}
    assert {key for key in leaves if list(model.get_submodule(key).parameters())} <= backward.keys()
    blocks = [out for key, out in forward.items() if key.count(".") == 3 and isinstance(out, torch.Tensor)]
    assert all(len(out) % 3 == 0 for out in blocks)


def loops(model):
    """Sequences that a layer goes through itself."""
    return {key for key, module in model.named_modules() if isinstance(module, nn.Sequential)}


def test_weights_written_through_data_are_used(name):
    """As EMA helpers, pruning and ablations write them, after an evaluation."""
    model = shallow(name)
    with torch.no_grad():
        before = model(image())
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        written = model(image())
        again = shallow(name)
        again.load_state_dict(model.state_dict())
        assert torch.equal(written, again(image()))
    assert not torch.equal(written, before)


def test_dynamic_quantization_converts_every_linear_layer(name):
    model = shallow(name)
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert all(type(model.get_submodule(key)) is nn.Linear for key in linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, and as much used as ever
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert all("quantized" in type(quantized.get_submodule(key)).__module__ for key in linear)
    with torch.no_grad():
        assert quantized(image()).isfinite().all()


def test_peft_adapts_every_linear_layer(name):
    """LoRA starts as the network itself, every adapter learns, and what it learnt can be merged into the weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = shallow(name).double(), image().double()
    linear = [key for key, module in model.named_modules() if type(module) is nn.Linear]
    with torch.no_grad():
        expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linear))
    out = adapted(x)
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    learning = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * len(linear)
    assert all(p.grad is not None for p in learning.values())
    assert all(p.grad.any() for key, p in learning.items() if "lora_B" in key)  # A learns once B is not zero
    with torch.no_grad():
        for p in learning.values():
            p.add_(0.01)
        learnt = adapted(x)
        torch.testing.assert_close(adapted.merge_and_unload()(x), learnt)
    assert not torch.equal(learnt, expected)


def test_functional_transforms_and_fake_tensors_do_not_change_it(name):
    model = shallow(name)
    with torch.no_grad():
        expected = model(image())
    weights = {key: value.detach() for key, value in model.named_parameters()}
    slopes = grad(lambda w: functional_call(model, w, (image(),)).square().mean())(weights)
    assert all(slope.isfinite().all() for slope in slopes.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch takes image after image for some operators
        each = vmap(lambda x: functional_call(model, weights, (x[None],))[0])(image())
        skeleton = copy.deepcopy(model).to("meta")  # as ensembles are called
        called = functional_call(skeleton, model.state_dict(), (image(),))
        assert all((out - expected).abs().max() < 1e-4 * expected.std() for out in (each, called))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model(mode.from_tensor(image())).shape == expected.shape
    with torch.no_grad():
        torch.testing.assert_close(model(image()), expected)


def test_counters_see_every_layer(name):
    """Multiplications by PyTorch's counter of operators are those that the layers alone make, and more."""
    model, layers = shallow(name), 0

    def count(module, args, out):
        nonlocal layers
        per_output = module.weight[0].numel()
        layers += 2 * out.numel() * per_output

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image())
    assert layers <= counter.get_total_flops() < 3 * layers


@pytest.mark.parametrize("structured", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_pruned_layers_are_used_after_an_evaluation(name, structured):
    """PyTorch's pruning puts a masked tensor in the place of a parameter, and computes it before every call."""
    model, pruned = shallow(name), shallow(name)
    layers = [module for module in pruned.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    with torch.no_grad():
        before = pruned(image())
        for layer in layers:
            if structured:
                prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
            else:
                prune.l1_unstructured(layer, "weight", amount=0.5)
        masked = pruned(image())
        for layer in layers:
            prune.remove(layer, "weight")
        model.load_state_dict(pruned.state_dict())
        torch.testing.assert_close(masked, model(image()))
    assert not torch.equal(masked, before)


def test_torchao_quantizes_the_weights(name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = shallow(name)
    with torch.no_grad():
        expected = model(image())
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        error = (model(image()) - expected).abs().max() / expected.std()
    assert 0 < error < 0.3


@functools.lru_cache(maxsize=1)  # tests go model by model (see `conftest`)
def multiplications(name):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shallow(name)(image())
    return counter.get_total_flops() / 2


def layers_of(model):
    """Names of the layers that multiply."""
    return {key for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d)}


def test_thop_agrees_with_pytorchs_counter(name):
    thop = pytest.importorskip("thop", reason="thop is not installed")
    macs, _ = thop.profile(shallow(name), (image(),), verbose=False)
    assert macs == pytest.approx(multiplications(name), rel=0.15)


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops_agrees_with_pytorchs_counter(name, backend):
    """It counts modules and functions, or operators; norms and activations too."""
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    model = shallow(name)
    expected = multiplications(name) / 2  # of one image
    options = dict(backend=backend, as_strings=False, print_per_layer_stat=False, verbose=False)
    macs, parameters = ptflops.get_model_complexity_info(model, tuple(image().shape[1:]), **options)
    assert macs == pytest.approx(expected, rel=0.1)
    assert parameters == sum(p.numel() for p in model.parameters())


def test_fvcore_agrees_with_pytorchs_counter_and_sees_every_layer(name):
    """It counts the operators of a trace, module by module."""
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model = shallow(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated
        analysis = fvcore.FlopCountAnalysis(model, image())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert analysis.total() == pytest.approx(multiplications(name), rel=0.1)
    assert all(analysis.by_module()[key] > 0 for key in layers_of(model))


def test_torchinfo_sees_every_layer(name):
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    model = shallow(name)
    summary = torchinfo.summary(model, input_data=image(), verbose=0)
    seen = {line.module for line in summary.summary_list if line.executed and line.macs > 0}
    assert {model.get_submodule(key) for key in layers_of(model)} <= seen
    assert summary.total_params == sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_a_cuda_graph_captures_and_replays_it(name, fused):
    model = shallow(name).cuda()
    model = model.fuse(image().shape[2:]) if fused else model
    static, other = image().cuda(), torch.randn(image().shape, device="cuda")
    with torch.no_grad():
        expected = model(other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(static)  # what is set up once is set up outside
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static)
        static.copy_(other)
        graph.replay()
        torch.testing.assert_close(out, expected)
