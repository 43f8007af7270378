"""The forward, compared with the oracle (transformers' MPT with biases) and a slow fp64 forward.

The tolerance in fp32 is 1e-5. A logit is a sum of about 64 products of size up to 0.1, which the
two sides add in different orders. 1e-5 is about 80 units in the last place of a logit slightly
above 1. A missing bias would change logits by 0.1.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import lively_tensors, oracle, ours, random_ids, small_config, twins

from phogpt_raw.model.cache import Piece, Step
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig, PhoGPT
from phogpt_raw.refusal import Refusal

FP32 = dict(rtol=0, atol=1e-5)
REAL, PADDING = 0, 1  # document numbers
SHAPES = pytest.mark.parametrize(
    ("heads", "width", "layers"), [(6, 8, 3), (8, 16, 2), (24, 8, 2)], ids=["6", "8", "24"])


def padded(config, side, lengths=(9, 4, 1)):
    """(ids_BL, doc_BL, mask of the real tokens) of rows with padding on one side."""
    ids_BL = random_ids(config, len(lengths), max(lengths))
    j = torch.arange(max(lengths))
    n = torch.tensor(lengths)[:, None]
    real_BL = j < n if side == "right" else j >= max(lengths) - n
    ids_BL[~real_BL] = 3
    return ids_BL, torch.where(real_BL, REAL, PADDING), real_BL


def next_token_loss(logits_BLV, ids_BL):
    return F.cross_entropy(logits_BLV[:, :-1].float().flatten(0, 1), ids_BL[:, 1:].flatten())


# -- logits


@SHAPES
@torch.no_grad()
def test_logits_are_the_oracles(heads, width, layers):
    config = small_config(heads, width, layers)
    model, other = twins(config)
    ids_BL = random_ids(config, 3, 40)
    logits_BLV = model.logits(model(ids_BL))
    assert logits_BLV.std() > 0.1  # logits near 0 would prove nothing
    torch.testing.assert_close(logits_BLV, other(ids_BL).logits, **FP32)


@SHAPES
@torch.no_grad()
def test_logits_in_bf16_are_no_further_off_than_the_oracles(heads, width, layers):
    """Both bf16 models are compared with an fp32 model that has the same bf16 weights.

    We round ALiBi's bias to bf16. MPT adds the bias in fp32, but rounds the attention weights. So
    neither error is always smaller; over 30,000 logits they are similar. The first limit is twice
    MPT's error.

    The second limit is ten roundings, because each value is rounded about ten times in sequence.
    One rounding of many values has an error of about 2^-9 of their standard deviation.
    """
    config = small_config(heads, width, layers)
    tensors = lively_tensors(config, dtype=torch.bfloat16)
    ids_BL = random_ids(config, 3, 40)
    exact = oracle(config, tensors)(ids_BL).logits
    model = ours(config, tensors, torch.bfloat16)
    error = model.logits(model(ids_BL)).float() - exact
    their_error = oracle(config, tensors, torch.bfloat16)(ids_BL).logits.float() - exact
    assert error.norm() <= 2 * their_error.norm()
    assert error.abs().max() <= 2 * their_error.abs().max()
    assert error.std() <= 10 * 2**-9 * exact.std()


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padded_rows_are_the_oracles(side):
    config = small_config(6)
    model, other = twins(config)
    ids_BL, doc_BL, real_BL = padded(config, side)
    logits_BLV = model.logits(model(ids_BL, doc_BL))
    expected = other(ids_BL, attention_mask=real_BL.long()).logits
    torch.testing.assert_close(logits_BLV[real_BL], expected[real_BL], **FP32)
    assert logits_BLV.isfinite().all()


@torch.no_grad()
def test_packed_documents_are_the_oracles_alone():
    config = small_config(6)
    model, other = twins(config)
    lengths = (11, 1, 20)
    ids_BL = random_ids(config, 1, sum(lengths))
    doc_BL = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model.logits(model(ids_BL, doc_BL))
    alone = torch.cat([other(ids).logits for ids in ids_BL.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, **FP32)


# -- the cache


@pytest.mark.parametrize("prompt", [1, 5, 16], ids=lambda n: f"prefill-{n}")
@pytest.mark.parametrize("heads", [6, 8])
@torch.no_grad()
def test_tokens_through_the_cache_are_the_oracles(heads, prompt):
    """One forward reads the prompt. The tokens after the prompt are read one at a time.

    The cache has unused positions.
    """
    config = small_config(heads)
    model, other = twins(config)
    ids_BL = random_ids(config, 2, 17)
    cache = model.new_cache(3, 30)
    logits = [model.logits(model(ids_BL[:, :prompt], cache=Piece(cache)))]
    for place in range(prompt, 17):
        cache.place_B[:] = place
        ids = ids_BL[:, place : place + 1]
        logits.append(model.logits(model(ids, cache=Step(cache, 2, 20))))
    torch.testing.assert_close(torch.cat(logits, 1), other(ids_BL).logits, **FP32)


@torch.no_grad()
def test_a_prompt_in_pieces_through_the_cache_is_the_oracles():
    config = small_config(6)
    model, other = twins(config)
    ids_BL = random_ids(config, 2, 17)
    cache = model.new_cache(4, 17)
    logits_BLV = torch.cat([
        model.logits(model(ids_BL[:, start:stop], cache=Piece(cache, first=1, start=start)))
        for start, stop in ((0, 6), (6, 10), (10, 17))], 1)
    torch.testing.assert_close(logits_BLV, other(ids_BL).logits, **FP32)
    assert not any(kv[:, [0, 3]].any() for kv in cache.kv)  # rows 0 and 3 stay zero


@torch.no_grad()
def test_rows_of_unequal_lengths_step_together_as_the_oracle_does_alone():
    config = small_config(6)
    model, other = twins(config)
    lengths = [3, 9, 1]
    rows = [random_ids(config, 1, n + 5, seed=n) for n in lengths]
    cache = model.new_cache(3, 16)
    for n, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
        model(ids[:, :length], cache=Piece(cache, first=n))
    cache.place_B[:] = torch.tensor(lengths)
    for more in range(5):
        ids_B1 = torch.cat([ids[:, n + more : n + more + 1] for ids, n in zip(rows, lengths,
                                                                              strict=True)])
        got = model.logits(model(ids_B1, cache=Step(cache, 3, 16)))[:, 0]
        cache.place_B += 1
        wanted = torch.cat([other(ids[:, : n + more + 1]).logits[:, -1]
                            for ids, n in zip(rows, lengths, strict=True)])
        torch.testing.assert_close(got, wanted, **FP32)



# -- gradients


def test_loss_and_every_gradient_are_the_oracles():
    config = small_config(6, 8, 3)
    model, other = twins(config)
    ids_BL = random_ids(config, 3, 24)
    loss = next_token_loss(model.logits(model(ids_BL)), ids_BL)
    expected = other(ids_BL, labels=ids_BL).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        # Two fp32 sums over 72 tokens in different orders differ by about a millionth of the
        # largest element. The tolerance is ten times as much.
        size = theirs[name].grad.abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5 * size,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
def test_gradient_on_a_middle_activation_is_the_oracles(recompute):
    """LoRA needs the gradient of activations in a frozen base. The test compares one such gradient.

    It is the gradient of block 0's output. To get it, the test adds a zero tensor to this output
    and computes the gradient of the zero tensor. recompute: the number of recomputed blocks.
    """
    config = small_config(6, 8, 3)
    model, other = (m.requires_grad_(False) for m in twins(config))
    ids_BL, doc_BL, real_BL = padded(config, "right")
    expected = middle_gradient(other, ids_BL, lambda: other(ids_BL, attention_mask=real_BL.long()
                                                            ).logits, real_BL)
    got = middle_gradient(model, ids_BL, lambda: model.logits(
        model(ids_BL, doc_BL, recompute=recompute)), real_BL)
    # The tolerance is relative to the largest element. In two blocks the sides add fp32 values in
    # different orders.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def middle_gradient(model, ids_BL, logits, real_BL):
    config = model.config
    leaf = torch.zeros(*ids_BL.shape, config.d_model, requires_grad=True)

    def add(block, given, out):
        return (out[0] + leaf, *out[1:]) if isinstance(out, tuple) else out + leaf

    hook = model.transformer.blocks[0].register_forward_hook(add)
    scored = real_BL[:, 1:] & real_BL[:, :-1]
    F.cross_entropy(logits()[:, :-1][scored], ids_BL[:, 1:][scored]).backward()
    hook.remove()
    return leaf.grad


@pytest.mark.parametrize("recompute", [1, 2, 3])
def test_gradients_are_the_same_however_much_is_recomputed(recompute):
    """The gradients are equal bit for bit, because recomputation runs the same operations later."""
    config = small_config(6, 8, 3)
    model = ours(config, lively_tensors(config)).train()
    ids_BL, doc_BL, _ = padded(config, "left")

    def gradients(depth):
        model.zero_grad()
        loss = next_token_loss(model.logits(model(ids_BL, doc_BL, recompute=depth)), ids_BL)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    (loss, saved), (same_loss, recomputed) = gradients(0), gradients(recompute)
    assert torch.equal(loss, same_loss)
    for a, b in zip(saved, recomputed, strict=True):
        assert torch.equal(a, b)


def test_recomputed_blocks_keep_less_for_backward():
    config = small_config(6, 8, 3)
    model = ours(config, lively_tensors(config)).train()
    ids_BL = random_ids(config, 2, 32)

    def kept_elements(depth):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            hidden = model(ids_BL, recompute=depth)
        assert hidden.requires_grad
        return sum(t.numel() for t in storages.values())

    kept = [kept_elements(depth) for depth in range(4)]
    assert kept == sorted(kept, reverse=True) and kept[3] < kept[2] < kept[1] < kept[0]


# -- the config


@pytest.mark.parametrize("attention", [
    dict(clip_qkv=0.3), dict(softmax_scale=0.7), dict(clip_qkv=0.5, softmax_scale=0.05),
], ids=str)
@torch.no_grad()
def test_clip_and_scale_are_honoured(attention):
    plain, config = small_config(6), small_config(6, attn_config=attention)
    model, other = twins(config)
    ids_BL = random_ids(config, 2, 30)
    logits_BLV = model.logits(model(ids_BL))
    torch.testing.assert_close(logits_BLV, other(ids_BL).logits, **FP32)
    without = ours(plain, lively_tensors(config))
    assert (logits_BLV - without.logits(without(ids_BL))).abs().max() > 1e-2


@pytest.mark.parametrize("fields", [
    {}, dict(expansion_ratio=2), dict(expansion_ratio=3), dict(attn_config=dict(alibi_bias_max=4)),
    dict(attn_config=dict(alibi_bias_max=16)), dict(layer_norm_epsilon=0.1),
    dict(no_bias=True), dict(no_bias=True, expansion_ratio=2, attn_config=dict(clip_qkv=0.4)),
], ids=str)
@torch.no_grad()
def test_logits_are_those_of_a_slow_forward(fields):
    config = small_config(6, 8, 2, **fields)
    tensors = lively_tensors(config)
    ids_BL = random_ids(config, 2, 20)
    model = ours(config, tensors)
    expected = torch.stack([slow_logits(config, tensors, ids.tolist()) for ids in ids_BL])
    torch.testing.assert_close(model.logits(model(ids_BL)).double(), expected, **FP32)


def slow_logits(config, tensors, ids):
    """Logits [L, V] in fp64 by the papers' formulas, one token, head and key at a time."""
    tensors = {name: t.double() for name, t in tensors.items()}
    attention, heads = config["attn_config"], config["n_heads"]
    width, n = config["d_model"] // heads, 2 ** math.ceil(math.log2(heads))
    powers = list(range(1, n + 1))
    order = powers if n == heads else (powers[1::2] + powers[::2])[:heads]
    slopes = [2.0 ** (-attention["alibi_bias_max"] * i / n) for i in order]
    scale = attention["softmax_scale"] or 1 / math.sqrt(width)

    def linear(x, name):
        y = x @ tensors[f"{name}.weight"].T
        return y if config["no_bias"] else y + tensors[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.get("layer_norm_epsilon", 1e-5)).sqrt()
        x = x * tensors[f"{name}.weight"]
        return x if config["no_bias"] else x + tensors[f"{name}.bias"]

    x = torch.stack([tensors["transformer.wte.weight"][i] for i in ids])
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}"
        qkv = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.Wqkv")
        if attention["clip_qkv"]:
            qkv = qkv.clamp(-attention["clip_qkv"], attention["clip_qkv"])
        q, k, v = qkv.chunk(3, -1)
        mixed = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(len(ids)):
                scores = [scale * (q[i, part] @ k[j, part]) - slopes[h] * (i - j)
                          for j in range(i + 1)]
                weights = torch.stack(scores).softmax(0)
                mixed[i, part] = sum(w * v[j, part] for j, w in enumerate(weights))
        x = x + linear(mixed, f"{block}.attn.out_proj")
        up = linear(norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")
        x = x + linear(up * (1 + torch.erf(up / math.sqrt(2))) / 2, f"{block}.ffn.down_proj")
    return norm(x, "transformer.norm_f") @ tensors["transformer.wte.weight"].T


def test_vinais_own_config_is_accepted_as_it_is():
    config = small_config(6)
    config |= dict(name_or_path="vinai/PhoGPT-7B5", is_encoder_decoder=False)
    assert config["learned_pos_emb"] is True and config["attn_config"]["attn_pdrop"] == 0.0
    assert isinstance(config["attn_config"]["attn_pdrop"], float)
    assert {"auto_map", "init_config", "init_device"} <= config.keys()
    assert ModelConfig.from_json(config) == ModelConfig(48, 6, 2, 256, 64)


def test_no_bias_makes_a_model_without_biases():
    with torch.device("meta"):
        names = [n for n, _ in PhoGPT(ModelConfig(8, 2, 2, 8, 8, no_bias=True)).named_parameters()]
    assert names and not any(name.endswith("bias") for name in names)


@pytest.mark.parametrize(("name", "parameters"), [("7b5", 7_471_767_552), ("4b", 3_688_077_312)])
def test_published_shapes_have_vinais_size_and_193_biases(name, parameters):
    with torch.device("meta"):
        model = PhoGPT(PUBLISHED[name])
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(n.endswith("bias") for n in sizes) == 193
    assert sum(sizes.values()) == parameters


@pytest.mark.parametrize(("field", "value"), [
    ("attn_config.qk_ln", True), ("attn_config.qk_gn", True), ("attn_config.rope", True),
    ("attn_config.prefix_lm", True), ("attn_config.alibi", False),
    ("attn_config.attn_type", "multiquery_attention"), ("attn_config.attn_pdrop", 0.1),
    ("attn_config.attn_uses_sequence_id", True), ("attn_config.sliding_window_size", 64),
    ("logit_scale", "inv_sqrt_d_model"), ("norm_type", "rmsnorm"), ("tie_word_embeddings", False),
    ("resid_pdrop", 0.1), ("emb_pdrop", 0.1), ("model_type", "llama"),
])
def test_what_is_not_supported_is_refused_by_the_fields_name(field, value):
    config = small_config(6)
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(Refusal) as refusal:
        ModelConfig.from_json(config, "base/config.json")
    for part in ("base/config.json", f"{field} = {value!r}"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("field", ["d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len"])
def test_a_missing_field_is_refused_by_name(field):
    config = small_config(6)
    del config[field]
    with pytest.raises(Refusal, match=rf"base/config\.json.*{field}"):
        ModelConfig.from_json(config, "base/config.json")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(Refusal, match=r"d_model 48.*n_heads 5"):
        ModelConfig.from_json(small_config(6) | dict(n_heads=5))


@pytest.mark.parametrize("fields", [
    {"norm_eps": 1e-3}, {"norm_eps": 1e-3, "layer_norm_epsilon": 1e-3}])
def test_llm_foundrys_name_of_the_norms_epsilon_is_honoured(fields):
    config = small_config(6)
    config.pop("layer_norm_epsilon", None)
    assert ModelConfig.from_json(config | fields).layer_norm_epsilon == 1e-3


@pytest.mark.parametrize("fields, said", [
    ({"norm_eps": 1e-3, "layer_norm_epsilon": 1e-5}, "two names of one value"),
    ({"ffn_config": {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "relu"}}}, "ffn_act_fn"),
    ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_type"), ({"ffn_act_fn": "relu"}, "ffn_act_fn"),
    ({"attn_config": {"attn_logit_softcapping": 1.0}}, "attn_logit_softcapping"),
    ({"attn_config": [1]}, "attn_config is not an object"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
    ({"n_layers": 10**6}, "n_layers = 1000000 is not a whole number from 1 to 1,024"),
    ({"n_layers": True}, "n_layers = True"), ({"n_layers": 2.0}, "n_layers = 2.0"),
    ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
    ({"attn_config": {"alibi_bias_max": 0}}, "alibi_bias_max"),
    ({"attn_config": {"clip_qkv": -1}}, "clip_qkv"),
    ({"attn_config": {"softmax_scale": float("inf")}}, "softmax_scale")])
def test_what_would_be_computed_otherwise_is_refused_by_name(fields, said):
    with pytest.raises(Refusal, match=f"config.json: .*{said}"):
        ModelConfig.from_json(small_config(6) | fields)
