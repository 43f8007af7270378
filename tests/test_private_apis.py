"""Tests of every private API that the project calls. A failure tells what to do without the API.

Without a GPU the CUDA attention kernels run on the meta device. This checks that their operations
and arguments exist in this build of torch. On a GPU their values are compared too.
"""

import ast
import types
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from phogpt_raw import private_apis
from phogpt_raw.model.nf4 import dequantise, nf4_linear
from phogpt_raw.private_apis import nf4_fields, nf4_state

ROOT = Path(__file__).parents[1]
PUBLIC_ATTENTION = (
    "call F.scaled_dot_product_attention on each block of queries in model/attention.py and let "
    "autograd do its backward: slower on long rows, the same result"
)


@contextmanager
def without_it(advice: str):
    """Turn any error in the `with` block into a test failure that begins with advice."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"A private API has changed or gone. What to do: {advice}.\n"
                    f"{type(error).__name__}: {error}")


# -- attention

CUDA_KERNELS = [(private_apis.efficient_attention, private_apis.efficient_attention_backward),
                (private_apis.cudnn_attention, private_apis.cudnn_attention_backward)]
CPU_KERNEL = private_apis.cpu_attention, private_apis.cpu_attention_backward


def attention_problem(device, dtype=torch.float32):
    """q, k, v [2, 3, 16, 64], a bias [1, 3, 16, 16] and the gradient of the output."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 16, 64).to(device, dtype) for _ in range(4))
    return q, k, v, torch.randn(1, 3, 16, 16).to(device, dtype), g


def through(kernel, q, k, v, bias, g, scale=0.2):
    """[out, dq, dk, dv] from the forward and the backward of a kernel."""
    forward, backward = kernel
    out, *saved = forward(q, k, v, bias, scale)
    return [out, *backward(g, q, k, v, bias, out, *saved, scale)]


def public_attention(q, k, v, bias, g, scale=0.2):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), g)]


def test_the_cpus_attention_is_the_public_one():
    with without_it(PUBLIC_ATTENTION):
        problem = attention_problem("cpu")
        got, wanted = through(CPU_KERNEL, *problem), public_attention(*problem)
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=["efficient", "cudnn"])
def test_the_attention_of_cuda_cards_takes_our_arguments(kernel):
    with without_it(PUBLIC_ATTENTION):
        q, k, v, bias, g = attention_problem("meta", torch.float16)
        out, *gradients = through(kernel, q, k, v, bias, g)
        assert out.shape == v.shape and [d.shape for d in gradients] == 3 * [q.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=["efficient", "cudnn"])
def test_the_attention_of_cuda_cards_is_the_public_one(kernel):
    """The relative norm of the error may be 4e-3, which is eight fp16 roundings of eps / 2 = 2^-11.
    """
    problem = attention_problem("cuda", torch.float16)
    wanted = public_attention(*attention_problem("cpu"))
    if kernel[0] is private_apis.cudnn_attention and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuDNN's attention needs compute capability 8.0")
    with without_it(PUBLIC_ATTENTION):
        for mine, exact in zip(through(kernel, *problem), wanted, strict=True):
            assert (mine.cpu().float() - exact).norm() < 4e-3 * exact.norm()


DOCUMENT_KERNELS = {
    "efficient": (private_apis.efficient_documents, private_apis.efficient_documents_backward, 1),
    "flash": (private_apis.flash_documents, private_apis.flash_documents_backward, 0)}
MASKED_BIAS = ("let model/documents.py's choose_kernel return None: documents are then hidden by a "
               "masked bias, slower on long rows, the same result")


def documents_through(kernel, device):
    """([out, dq, dk, dv] of a kernel, the same by torch's public function, operations that ran).

    The documents have 10, 0 and 6 tokens.
    """
    forward, backward, rows = DOCUMENT_KERNELS[kernel]
    torch.manual_seed(0)
    shape = (*[1] * rows, 16, 3, 64)
    q, k, v, g = (torch.randn(shape).to(device, torch.float16) for _ in range(4))
    starts = torch.tensor([0, 10, 10, 16], dtype=torch.int32).to(device)
    operations = []

    class Watching(private_apis.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            operations.append(operation)
            return operation(*args, **(kwargs or {}))

    with Watching():
        out, *kept = forward(q, k, v, starts, 10, 0.2)
        gradients = backward(g, q, k, v, out, *kept, starts, 10, 0.2)
    wanted = []
    for part in (slice(0, 10), slice(10, 16)):
        heads = [x.reshape(16, 3, 64)[part].transpose(0, 1)[None].float().requires_grad_()
                 for x in (q, k, v)]
        alone = F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.2)
        g_alone = g.reshape(16, 3, 64)[part].transpose(0, 1)[None].float()
        wanted.append([alone, *torch.autograd.grad(alone, heads, g_alone)])
    wanted = [torch.cat([x[0].transpose(0, 1) for x in pair]) for pair in zip(*wanted, strict=True)]
    return [out, *gradients], wanted, operations


@pytest.mark.parametrize("kernel", DOCUMENT_KERNELS)
def test_the_variable_length_kernels_take_our_arguments(kernel):
    with without_it(MASKED_BIAS):
        found, _, operations = documents_through(kernel, "meta")
        assert [x.shape for x in found] == 4 * [found[0].shape]
        assert [op for op in operations if private_apis.is_document_attention(op)] == operations[
            ::len(operations) - 1] and len(operations) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DOCUMENT_KERNELS)
def test_the_variable_length_kernels_are_the_public_one_on_each_document(kernel):
    """The relative norm of the error may be 4e-3, which is eight fp16 roundings of eps / 2 = 2^-11.
    """
    with without_it(MASKED_BIAS):
        found, wanted, _ = documents_through(kernel, "cuda")
        for mine, exact in zip(found, wanted, strict=True):
            assert (mine.float().reshape(exact.shape) - exact).norm() < 4e-3 * exact.norm()


def test_torch_says_which_attention_kernel_it_would_take():
    with without_it("name the kernels in a with sdpa_kernel([…]) around the public function in "
                    "model/attention.py; it raises where none of them fits"):
        q, k, v, bias, _ = attention_problem("cpu")
        assert private_apis.choose_attention_kernel(q, k, v, bias) == SDPBackend.FLASH_ATTENTION
        unfused = private_apis.choose_attention_kernel(q.int(), k.int(), v.int(), bias)
        assert unfused == SDPBackend.MATH
        assert private_apis.choose_attention_kernel(q, k, v, None) == SDPBackend.FLASH_ATTENTION


def test_the_choice_is_seen_and_answered_by_a_dispatch_mode():
    class Answering(private_apis.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if private_apis.is_attention_choice(operation):
                return SDPBackend.CUDNN_ATTENTION.value
            return operation(*args, **(kwargs or {}))

    with without_it("in simulate/trace.py replace model.attention.choose_kernel while simulating, "
                    "instead of answering the operation"):
        q, k, v, bias, _ = attention_problem("meta", torch.float16)
        with Answering():
            chosen = private_apis.choose_attention_kernel(q, k, v, bias)
        assert chosen == SDPBackend.CUDNN_ATTENTION


# -- autograd


def test_hooks_in_force_can_be_read():
    def pack(tensor):
        return tensor

    with without_it("let model/recompute.py stand aside inside torch's checkpoint: recompute the "
                    "whole block there, and norms and GELU only in blocks that are not recomputed"):
        assert private_apis.current_saved_tensor_hooks() is None
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.neg):
            assert private_apis.current_saved_tensor_hooks() == (pack, torch.neg)
        assert private_apis.current_saved_tensor_hooks() is None


def test_a_change_in_place_raises_the_version():
    with without_it("drop the two checks of versions in model/recompute.py: a change in place "
                    "would then give a wrong gradient instead of an error"):
        x = torch.zeros(3)
        before = private_apis.version_of(x)
        x[1:].add_(1)
        assert private_apis.version_of(x) == before + 1


def test_a_view_knows_its_base():
    with without_it("compare untyped_storage().data_ptr() in model/recompute.py, and recompute "
                    "nothing on the meta device"):
        x = torch.zeros(3, 4, requires_grad=True) * 1
        assert private_apis.base_of(x.view(4, 3)[1:]) is x and private_apis.base_of(x) is x


# -- operations and memory


def test_storages_have_keys_also_on_the_meta_device():
    with without_it("use id() of the storage objects in simulate/trace.py, and keep a strong "
                    "reference to one object for each storage"):
        a, b = torch.empty(3, device="meta"), torch.empty(3, device="meta")
        keys = [private_apis.storage_key(t.untyped_storage()) for t in (a, a[1:], b)]
        assert keys[0] == keys[1] != keys[2]


def test_operations_have_a_schema():
    with without_it("parse str(torch.ops.aten.….default) or list the operations that write in "
                    "place by hand in simulate/trace.py"):
        schema = private_apis.schema_of(torch.ops.aten.add_.Tensor)
        assert schema.is_mutable and schema.arguments[0].is_write
        assert not schema.arguments[1].is_write and schema.returns[0].alias_info.is_write


def test_the_view_of_matrix_products_exists():
    with without_it("remove it from the list of views in simulate/trace.py"):
        x = torch.zeros(6)
        assert private_apis.unsafe_view()(x, [2, 3]).data_ptr() == x.data_ptr()


def test_torch_has_formulas_of_flops():
    with without_it("write the FLOPs of addmm, mm and the attention kernels in simulate/trace.py "
                    "by hand"):
        addmm = private_apis.flop_registry[torch.ops.aten.addmm]
        x, w = torch.zeros(5, 7), torch.zeros(7, 3)
        out = torch.addmm(torch.zeros(3), x, w)
        assert addmm(torch.zeros(3), x, w, out_val=out) == 2 * 5 * 7 * 3


@pytest.mark.gpu
def test_workspaces_of_matrix_products_are_given_back():
    with without_it("leave the call out of bench/: peaks then hold up to 32 MiB more a stream"):
        torch.cuda.synchronize()
        torch.mm(*torch.randn(2, 64, 64, device="cuda"))
        before = torch.cuda.memory_allocated()
        private_apis.free_matmul_workspaces()
        assert torch.cuda.memory_allocated() < before


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_the_call_that_frees_workspaces_exists():
    with without_it("leave the call out of bench/: peaks then hold up to 32 MiB more a stream"):
        private_apis.free_matmul_workspaces()


# -- bitsandbytes

PIN = "pin bitsandbytes 0.50.2, or adapt private_apis to the new names"


def test_a_4_bit_weight_has_a_state_with_the_fields_that_decode_it():
    with without_it(f"read them from state.as_dict(), whose keys are a file format; else {PIN}"):
        weight = nf4_linear(torch.randn(300, 64), torch.bfloat16, "cpu").weight
        fields = nf4_fields(nf4_state(weight))
        assert nf4_state(torch.zeros(3)) is None
        assert (fields.shape, fields.dtype) == ((300, 64), torch.bfloat16)
        tensors = [(t.dtype, tuple(t.shape)) for t in fields.tensors()]
        assert tensors == [(torch.uint8, (300,)), (torch.float32, (16,)), (torch.float32, ()),
                           (torch.float32, (2,)), (torch.float32, (256,))]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_state_made_of_its_fields_is_the_one_they_came_from(device):
    """The names of the attributes must be equal too. A cache would lose an unknown attribute."""
    with without_it(f"make it with QuantState.from_dict, whose keys are a file format; else {PIN}"):
        weight = nf4_linear(torch.randn(700, 96, device=device), torch.bfloat16, device).weight
        old = nf4_state(weight)
        new = private_apis.make_nf4_state(nf4_fields(old))
        for a, b in ((new, old), (new.state2, old.state2)):
            assert vars(a).keys() == vars(b).keys() - {"offset_on_host"}
            for name, value in vars(a).items():
                assert name == "state2" or value is vars(b)[name] or value == vars(b)[name], name
        wanted = bitsandbytes.functional.dequantize_4bit(weight.data, old)
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(weight.data, new), wanted)


def test_the_dtype_that_dequantising_gives_can_be_set():
    with without_it(f"cast the result of dequantize_4bit in model/nf4.py; else {PIN}"):
        weight = nf4_linear(torch.randn(64, 64), torch.float32, "cpu").weight
        private_apis.set_dequantised_dtype(nf4_state(weight), torch.float16)
        assert dequantise(weight).dtype == torch.float16


def test_a_layer_takes_a_state_and_never_repacks_its_weight():
    with without_it(f"call dequantise and F.linear in model/lora.py instead of the layer where no "
                    f"gradient is needed; else {PIN}"):
        linear = nf4_linear(torch.randn(64, 64), torch.bfloat16, "cpu").eval()
        private_apis.attach_state(linear, nf4_state(linear.weight))  # as nf4_linear does
        assert linear.quant_state is nf4_state(linear.weight)
        assert linear.support_avx512bf16_for_cpu is False
        before = linear.weight.clone()
        with torch.no_grad():
            linear(torch.randn(1, 64, dtype=torch.bfloat16))
        assert torch.equal(before, linear.weight)
        # bitsandbytes still sets this attribute in each new layer.
        assert "support_avx512bf16_for_cpu" in vars(bitsandbytes.nn.Linear4bit(64, 64))


def test_the_code_of_scales_is_made_on_the_cpu(monkeypatch):
    with without_it("quantise one weight on the CPU before the first on the meta device in "
                    "simulate/trace.py, which fills bitsandbytes' cache too"):
        monkeypatch.setattr(bitsandbytes.functional, "name2qmap", {})
        private_apis.make_scale_code()
        nf4_linear(torch.empty(64, 64, device="meta"), torch.float16, "meta")
        weight = nf4_linear(torch.randn(64, 64), torch.float32, "cpu").weight
        assert dequantise(weight).abs().max() > 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_state_of_an_8_bit_optimizer_is_made_before_its_first_step(device):
    with without_it("let the first step make the state in training/optim.py: correct, but a step "
                    f"that runs out of memory there cannot be done again; else {PIN}"):
        flat = torch.nn.Parameter(torch.zeros(200_192, device=device))
        kind = bitsandbytes.optim.PagedAdamW8bit if device == "cuda" else \
            bitsandbytes.optim.AdamW8bit
        optimizer = kind([flat], lr=1.0)
        private_apis.make_state(optimizer, flat)
        made = dict(optimizer.state[flat])
        assert {"step", "state1", "state2", "absmax1", "absmax2"} <= made.keys()
        assert getattr(made["state1"], "is_paged", False) == (device == "cuda")
        flat.grad = torch.ones_like(flat)
        optimizer.step()
        assert all(optimizer.state[flat][name] is made[name] for name in ("state1", "absmax1"))
        assert optimizer.state[flat]["step"] == 1 and (flat < -0.9).all()


@pytest.mark.parametrize("value, flag", [(1.0, 0.0), (1e20, 0.0), (float("inf"), 1.0),
                                         (float("nan"), 1.0)])
def test_the_flag_is_that_by_which_the_update_is_skipped(value, flag):
    """The update also runs if the gradients are finite and only their norm is infinite.

    For example, 1e20 squared overflows.
    """
    with without_it("compare scaler.get_scale() before and after scaler.update() in "
                    f"training/step.py, which waits for the GPU; else {PIN}"):
        flat = torch.nn.Parameter(torch.zeros(8))
        optimizer = torch.optim.SGD([flat], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        flat.grad = torch.full((8,), value)
        scaler.unscale_(optimizer)
        assert float(private_apis.found_inf(scaler, optimizer)) == flag
        scaler.step(optimizer)
        assert bool((flat != 0).any()) == (flag == 0.0)
        disabled = torch.amp.GradScaler("cpu", enabled=False)
        assert private_apis.found_inf(disabled, optimizer) is None


# -- no other module uses private APIs

# Private names that do not begin with an underscore.
UNDOCUMENTED = {"quant_state", "absmax", "state2", "support_avx512bf16_for_cpu", "page_mng",
                "paged_tensors", "init_state", "name2qmap", "create_dynamic_map", "get_paged",
                "flop_registry"}
# The keys "state1" and "state2" in the 8-bit optimizer's state_dict are public: its file format.
KEYS = {"state2"}


def is_private(name: str) -> bool:
    return name in UNDOCUMENTED or (name.startswith("_") and not name.startswith("__"))


def private_names(source: str) -> list[str]:
    """The private attributes and imports in the text of a source file.

    A name is private if it begins with one underscore or is in UNDOCUMENTED. Attributes of `self`
    and `cls` do not count.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if is_private(node.attr) and not own:
                found.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            ours = node.module.split(".")[0] in ("phogpt_raw", "bench")
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found += [] if ours else [name for name in names if is_private(name)]
        elif isinstance(node, ast.Constant) and node.value in UNDOCUMENTED - KEYS:
            found.append(node.value)  # getattr(…, "quant_state")
    return found


def test_no_other_module_names_a_private_api():
    files = [*ROOT.glob("*.py"), *ROOT.glob("phogpt_raw/**/*.py"), *ROOT.glob("bench/**/*.py")]
    found = {str(file.relative_to(ROOT)): private_names(file.read_text("utf-8")) for file in files}
    listed = found.pop("phogpt_raw/private_apis.py")
    assert len(set(listed)) > 15
    assert {file: names for file, names in found.items() if names} == {}


def test_every_entry_has_a_test_here():
    functions = [name for name, value in vars(private_apis).items()
                 if getattr(value, "__module__", "") == private_apis.__name__
                 and isinstance(value, types.FunctionType)]
    assert len(functions) > 15
    source = Path(__file__).read_text("utf-8")
    assert [name for name in functions if name not in source] == []


@pytest.mark.parametrize(("line", "names"), [
    ("torch._C._cuda_clear()", ["_cuda_clear", "_C"]), ("x.untyped_storage()._cdata", ["_cdata"]),
    ("from torch.utils._python_dispatch import X", ["_python_dispatch"]),
    ("getattr(p, 'quant_state', None)", ["quant_state"]), ("state.state2.code", ["state2"]),
    ("from bitsandbytes.functional import name2qmap", ["name2qmap"]),
    ("self._x = super().__init__()", []), ("values['state2']", []),
    ("from phogpt_raw.private_apis import flop_registry", []), ("tensor.shape", []),
])
def test_a_private_name_is_found_wherever_it_stands(line, names):
    assert private_names(line) == names


def test_what_a_module_holds_is_all_of_its_own_tensors():
    from phogpt_raw.model.nf4 import nf4_linear

    linear = nf4_linear(torch.randn(64, 64), torch.float32, torch.device("cpu"))
    linear.register_buffer("more", torch.ones(1))
    held = private_apis.held_by(linear)
    for value in (linear.weight, linear.more, private_apis.nf4_state(linear.weight)):
        assert any(one is value for one in held)
    assert all(one is not None for one in held)
    assert private_apis.held_by(torch.nn.Sequential(linear)) == []
