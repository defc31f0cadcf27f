# SPDX-License-Identifier: Apache-2.0
"""Upcycling: from a model, a checkpoint or parts; what the new model says; router files; what is refused."""

import copy
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from parts import MAIN_FAMILIES, pictures
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moellava import (
    MoellavaConfig,
    MoellavaForCausalLM,
    MoellavaModel,
    MoellavaMoeConfig,
    inspect_checkpoint,
    load_pretrained_model,
    upcycle,
)
from moellava.parts.moe_block_moellava import SparseMoeBlock


LAYERS = {
    "first_half": [0, 1],
    "second_half": [2, 3],
    "sparse": [0, 2],
    "dense": [0, 1, 2, 3],
    "indices": [1, 2, 3],
}
TEXT = ["<image> What is it?", "No picture here, only words.", "Is <image> like <image> or not?"]
# Other families whose MLPs have one of the known forms.
OTHER_FAMILIES = ("phi3", "gemma", "gemma2", "qwen3", "olmo2", "cohere", "gpt_neox", "falcon")


@pytest.fixture(scope="module")
def dense_of(parts):
    """A function: the dense model of a family. Tests share the models and do not change them."""
    models = {}

    def make(family: str = "llama") -> MoellavaForCausalLM:
        if family not in models:
            torch.manual_seed(0)
            models[family] = load_pretrained_model(
                parts.language_model(family), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
            ).model
        return models[family]

    return make


@pytest.fixture(scope="module")
def dense(dense_of) -> MoellavaForCausalLM:
    return dense_of()


@pytest.fixture(scope="module")
def dense_folder(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse_folder(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    upcycle(dense, num_experts=8, layers="second_half").save_pretrained(folder)
    return folder


def with_pictures(model) -> dict:
    images = pictures(3)
    return model.processor(images=[images[:1], [], images[1:]], text=TEXT, padding=True, return_tensors="pt")


def without_pictures(model) -> dict:
    text = ["Only words.", "No picture here, and more words."]
    return model.processor(text=text, padding=True, return_tensors="pt")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).double().norm() / expected.double().norm()).item()


def blocks_of(model) -> dict[int, SparseMoeBlock]:
    layers = model.model.language_model.get_submodule("layers")
    return {index: layer.mlp for index, layer in enumerate(layers) if isinstance(layer.mlp, SparseMoeBlock)}


# ---------------------------------------------------------------------------------------------------------------------
# What the new model says
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", MAIN_FAMILIES)
@torch.no_grad()
def test_identity(dense_of, family, layers):
    """With renormalised weights the new model says what the dense one says: all experts are the same MLP."""
    dense = dense_of(family)
    position = MAIN_FAMILIES.index(family) + list(LAYERS).index(layers)
    experts, k = ((4, 2), (4, 3), (2, 2))[position % 3]
    given = LAYERS[layers] if layers == "indices" else layers
    sparse = upcycle(dense, num_experts=experts, num_experts_per_tok=k, layers=given, use_residual=position % 4 == 0)
    assert sparse.config.moe_config.layers == sorted(blocks_of(sparse)) == LAYERS[layers]
    assert sparse.config.moe_config.norm_topk_prob
    sparse.set_experts_implementation(("sorted_mm", "eager", "grouped_mm", "batched_mm")[position % 4])
    for inputs in (with_pictures(dense), without_pictures(dense)):
        expected = dense(**inputs).logits
        assert expected.std() > 0.1
        assert relative_error(sparse(**inputs).logits, expected) < 1e-5
    # The routers do choose: not every token goes to the same experts.
    logits = sparse(**inputs, output_router_logits=True).router_logits
    assert (
        all(len(set(map(tuple, layer.topk(k).indices.sort().values.tolist()))) > 1 for layer in logits) or k == experts
    )


@pytest.mark.parametrize("family", OTHER_FAMILIES)
@torch.no_grad()
def test_identity_of_other_families(dense_of, family):
    dense = dense_of(family)
    sparse = upcycle(dense, layers="dense")
    for inputs in (with_pictures(dense), without_pictures(dense)):
        assert relative_error(sparse(**inputs).logits, dense(**inputs).logits) < 1e-5


FORMULAS = {
    "top-1, not normalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "top-1": {"num_experts_per_tok": 1},
    "top-2, not normalised": {"num_experts_per_tok": 2, "norm_topk_prob": False},
    "meta expert": {"num_experts_per_tok": 2, "use_meta_expert": True},
    "top-1 with meta expert": {"num_experts_per_tok": 1, "use_meta_expert": True, "router_bias": True},
    "top-1 with residual": {"num_experts_per_tok": 1, "use_residual": True},
    "all of it": {"num_experts_per_tok": 1, "use_residual": True, "use_meta_expert": True},
}


@torch.no_grad()
def said_by_formula(dense, sparse, inputs) -> torch.Tensor:
    """The dense model, every sparse layer's MLP of which is multiplied by what the formulas make of equal experts."""
    moe, handles = sparse.config.moe_config, []

    def factor_of(block, tokens: torch.Tensor) -> torch.Tensor:
        weights = block.state_dict()
        scores = tokens.double() @ weights["gate.weight"].double().T
        if "gate.bias" in weights:
            scores = scores + weights["gate.bias"].double()
        probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
        factor = probabilities.sort(-1, descending=True).values[..., : moe.num_experts_per_tok].sum(-1, keepdim=True)
        if moe.norm_topk_prob:
            factor = torch.ones_like(factor)
        if moe.use_residual:
            mixed = tokens.double() @ weights["coefficient.weight"].double().T + weights["coefficient.bias"].double()
            ours, theirs = mixed.exp().unbind(-1)
            share = (ours / (ours + theirs)).unsqueeze(-1)
            factor = share * factor + 1 - share
        return factor + 1 if moe.use_meta_expert else factor

    for index, block in blocks_of(sparse).items():

        def multiplied(module, arguments, output, block=block):
            return (output * factor_of(block, arguments[0])).to(output.dtype)

        handles.append(dense.model.language_model.layers[index].mlp.register_forward_hook(multiplied))
    logits = dense(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("form", FORMULAS)
@pytest.mark.parametrize("family", MAIN_FAMILIES)
@torch.no_grad()
def test_what_other_forms_say(dense_of, family, form):
    dense = dense_of(family)
    layers = list(LAYERS)[(MAIN_FAMILIES.index(family) + list(FORMULAS).index(form)) % 4]
    sparse = upcycle(dense, num_experts=4, layers=layers, **FORMULAS[form])
    inputs = with_pictures(dense)
    expected = said_by_formula(dense, sparse, inputs)
    assert relative_error(sparse(**inputs).logits, expected) < 1e-5
    changes = sparse.config.moe_config.use_meta_expert or not sparse.config.moe_config.norm_topk_prob
    assert (relative_error(expected, dense(**inputs).logits) > 1e-2) == changes


@torch.no_grad()
def test_generation_is_that_of_the_dense_model(dense):
    sparse = upcycle(dense, layers="dense")
    inputs = with_pictures(dense)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(sparse.generate(**inputs, **options), dense.generate(**inputs, **options))


def test_capacity_that_holds_everything_changes_nothing(dense):
    """With 4 experts, 2 choices and a factor of 2, as MoE-LLaVA is evaluated, no token is dropped."""
    sparse = upcycle(dense, layers="dense", eval_capacity_factor=2.0, capacity_factor=1.5)
    inputs = with_pictures(dense)
    with torch.no_grad():
        assert relative_error(sparse(**inputs).logits, dense(**inputs).logits) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The weights, and the model that they came from
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_expert_is_the_dense_mlp(dense_of, family):
    dense = dense_of(family)
    sparse = upcycle(dense, num_experts=3, layers=[0, 3], use_residual=True, use_meta_expert=True)
    assert sorted(blocks_of(sparse)) == [0, 3]
    for index, block in blocks_of(sparse).items():
        mlp = dense.model.language_model.layers[index].mlp
        own = mlp.state_dict()
        experts = block.experts.state_dict()
        if family == "phi":
            expected = {"up_proj": own["fc1.weight"], "up_proj_bias": own["fc1.bias"]}
            expected |= {"down_proj": own["fc2.weight"], "down_proj_bias": own["fc2.bias"]}
        else:
            expected = {"gate_up_proj": torch.cat([own["gate_proj.weight"], own["up_proj.weight"]])}
            expected["down_proj"] = own["down_proj.weight"]
        assert experts.keys() == expected.keys()
        for name, tensor in expected.items():
            assert all(torch.equal(expert, tensor) for expert in experts[name]), name
        for kept in (block.mlp, block.meta_expert):
            assert all(torch.equal(tensor, own[name]) for name, tensor in kept.state_dict().items())
    # Everything else is as it was.
    others = {name: t for name, t in dense.state_dict().items() if not any(f"layers.{i}.mlp." in name for i in (0, 3))}
    state = sparse.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in others.items())
    assert {name for name in state.keys() - others.keys() if ".mlp." not in name} == set()


def test_routers_are_new_and_differ(dense):
    torch.manual_seed(0)
    sparse = upcycle(dense, layers="dense", router_bias=True, use_residual=True)
    gates = [block.gate for block in blocks_of(sparse).values()]
    for gate in gates:
        assert gate.weight.shape == (4, 64)
        assert 0.15 < gate.weight.std() < 0.25  # the parts' initializer_range is 0.2
        assert (gate.bias == 0).all()
    assert not torch.equal(gates[0].weight, gates[1].weight)
    coefficients = [block.coefficient for block in blocks_of(sparse).values()]
    assert all(0.1 < coefficient.weight.std() < 0.3 for coefficient in coefficients)
    torch.manual_seed(0)
    again = upcycle(dense, layers="dense", router_bias=True, use_residual=True)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"use_residual": True},
        {"use_meta_expert": True},
        {"num_experts": 1, "num_experts_per_tok": 1, "use_residual": True, "use_meta_expert": True},
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi", "granite", "phi3"])
def test_the_dense_model_stays_as_it_is(dense_of, family, fields):
    """The two share no memory, and training one does not change the other."""
    dense = dense_of(family)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    config = dense.config.to_dict()
    sparse = upcycle(dense, layers="dense", **fields)
    assert dense.config.to_dict() == config
    assert sparse.config is not dense.config
    owners = {tensor.untyped_storage().data_ptr() for tensor in dense.state_dict().values()}
    shared = [name for name, tensor in sparse.state_dict().items() if tensor.untyped_storage().data_ptr() in owners]
    assert shared == []
    for block in blocks_of(sparse).values():  # nor do the copies within the block
        pointers = [parameter.untyped_storage().data_ptr() for parameter in block.parameters()]
        assert len(set(pointers)) == len(pointers)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_what_comes_along(dense):
    dense.generation_config.max_new_tokens = 17
    try:
        sparse = upcycle(dense)
    finally:
        dense.generation_config.max_new_tokens = None
    assert sparse.generation_config.max_new_tokens == 17
    assert sparse.processor is not dense.processor
    assert sparse.processor.to_dict() == dense.processor.to_dict()
    assert sparse.processor.chat_template == dense.processor.chat_template
    assert not sparse.training
    assert sparse.dtype == dense.dtype
    expected = dense.config.to_dict() | {"moe_config": sparse.config.to_dict()["moe_config"]}
    expected["parts"] = dense.config.parts | {"experts": "upcycled"}
    assert sparse.config.to_dict() == expected


def test_attention_and_dtype_are_kept(parts):
    loaded = load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), device="cpu",
        attn_implementation="eager", dtype=torch.bfloat16,
    ).model  # fmt: skip
    sparse = upcycle(loaded)
    for name, parameter in sparse.named_parameters():  # as when they are read from a checkpoint
        assert parameter.dtype == (torch.float32 if ".mlp.gate." in name else torch.bfloat16), name
    for part in (sparse.config, sparse.config.text_config, sparse.config.vision_config):
        assert part._attn_implementation == "eager"
    inputs = with_pictures(loaded)
    with torch.no_grad():
        output = sparse(**inputs, output_attentions=True, output_router_logits=True)
        assert relative_error(output.logits.float(), loaded(**inputs).logits.float()) < 2e-2
    assert len(output.attentions) == 4
    assert output.router_logits[0].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint, from parts
# ---------------------------------------------------------------------------------------------------------------------


def assert_same_but_routers(found: MoellavaForCausalLM, expected: MoellavaForCausalLM):
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    different = {name for name in one if not torch.equal(one[name], other[name])}
    assert all(".mlp.gate." in name or ".mlp.coefficient." in name for name in different), different


def test_upcycle_a_checkpoint(dense, dense_folder):
    expected = upcycle(dense, num_experts=3, num_experts_per_tok=1, layers="first_half", use_residual=True)
    for given in (dense_folder, str(dense_folder)):
        sparse = upcycle(given, num_experts=3, num_experts_per_tok=1, layers="first_half", use_residual=True)
        assert_same_but_routers(sparse, expected)
        assert sparse.config.to_dict() == expected.config.to_dict()
        assert sparse.processor.to_dict() == dense.processor.to_dict()
        assert not sparse.training


@pytest.mark.parametrize("kind", ["dictionary", "dataclass", "object", "config"])
def test_moe_config_of_load_pretrained_model(parts, dense, dense_folder, kind):
    @dataclass
    class Moe:
        num_experts: int = 4
        num_experts_per_tok: int = 1
        layers: list = field(default_factory=lambda: [1, 3])
        use_meta_expert: bool = True

    given = {
        "dictionary": {"num_experts": 4, "num_experts_per_tok": 1, "layers": [1, 3], "use_meta_expert": True},
        "dataclass": Moe(),
        "object": SimpleNamespace(num_experts=4, num_experts_per_tok=1, layers=[1, 3], use_meta_expert=True),
        "config": MoellavaMoeConfig(num_experts=4, num_experts_per_tok=1, layers=[1, 3], use_meta_expert=True),
    }[kind]
    expected = upcycle(dense, num_experts=4, num_experts_per_tok=1, layers=[1, 3], use_meta_expert=True)
    from_checkpoint = load_pretrained_model(dense_folder, moe_config=given, device="cpu").model
    assert_same_but_routers(from_checkpoint, expected)
    assert from_checkpoint.config.to_dict() == expected.config.to_dict()
    torch.manual_seed(0)  # the projector's seed, as in dense_of
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        {"model_path": str(parts.language_model("llama")), "mm_vision_tower": str(parts.vision_tower("clip"))},
        moe_config=given,
        device="cpu",
    )
    assert model.processor.tokenizer is tokenizer
    other = {"parts": None, "architectures": None}
    assert model.config.to_dict() | other == expected.config.to_dict() | other
    one, other = model.state_dict(), expected.state_dict()
    assert {n for n in one if not torch.equal(one[n], other[n]) and "projector" not in n} <= {
        f"model.language_model.layers.{index}.mlp.gate.weight" for index in (1, 3)
    }


def test_keywords_win_over_the_configuration(parts):
    model = load_pretrained_model(
        {
            "model_path": str(parts.language_model("llama")),
            "mm_vision_tower": str(parts.vision_tower("clip")),
            "moe_config": {"num_experts": 4, "top_k_experts": 1, "moe_mode": "dense"},
        },
        moe_config={"num_experts": 2},
        device="cpu",
    ).model
    moe = model.config.moe_config
    assert (moe.num_experts, moe.num_experts_per_tok, moe.layers) == (2, 1, [0, 1, 2, 3])


RUN_TIME = {
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 4,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.1,
    "sample_second_expert": True,
    "freeze_router": True,
}


@pytest.mark.parametrize("name", RUN_TIME)
def test_what_a_sparse_checkpoint_may_be_loaded_with(sparse_folder, name):
    own = MoellavaConfig.from_pretrained(sparse_folder).moe_config.to_dict()
    weights = load_file(sparse_folder / "model.safetensors")
    model = load_pretrained_model(sparse_folder, moe_config={name: RUN_TIME[name]}, device="cpu").model
    assert model.config.moe_config.to_dict() == own | {name: RUN_TIME[name]}
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in weights.items())
    if name == "freeze_router":
        assert not any(block.gate.weight.requires_grad for block in blocks_of(model).values())
    if name == "num_experts_per_tok":
        assert all(block.top_k == 6 for block in blocks_of(model).values())


def test_norm_topk_prob_stays_that_of_the_checkpoint(sparse_folder):
    for k in (1, 2, 3):
        moe = load_pretrained_model(sparse_folder, moe_config={"num_experts_per_tok": k}, device="cpu").model.config
        assert moe.moe_config.norm_topk_prob
    own = moe.moe_config.to_dict()
    given = MoellavaMoeConfig(**{name: own[name] for name in ("num_experts", "layers")} | {"num_experts_per_tok": 1})
    for moe in (given, {"num_experts_per_tok": 1, "norm_topk_prob": None}):
        assert load_pretrained_model(sparse_folder, moe_config=moe, device="cpu").model.config.moe_config.norm_topk_prob
    moe = {"num_experts_per_tok": 1, "norm_topk_prob": False}
    loaded = load_pretrained_model(sparse_folder, moe_config=moe, device="cpu").model
    assert not loaded.config.moe_config.norm_topk_prob


def test_a_config_object_says_of_top_1_weights_what_it_was_given(dense_folder, caplog):
    def made(moe):
        return load_pretrained_model(dense_folder, moe_config=moe, device="cpu").model.config.moe_config

    moe = MoellavaMoeConfig(num_experts=4, num_experts_per_tok=1)
    assert made(moe).norm_topk_prob
    assert "will not answer as the dense one" not in caplog.text
    moe = MoellavaMoeConfig(num_experts=4, num_experts_per_tok=1, norm_topk_prob=False)
    assert not made(moe).norm_topk_prob
    assert "norm_topk_prob is False" in caplog.text
    # Without upcycling, as older code has it.
    assert not MoellavaConfig(moe_config={"num_experts_per_tok": 1}).moe_config.norm_topk_prob


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts_per_tok": 1}, None),
        ({"num_experts_per_tok": 1, "use_residual": True}, None),
        ({"eval_capacity_factor": 2.0}, None),
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"use_meta_expert": True}, "use_meta_expert adds"),
        ({"eval_capacity_factor": 1.0}, "eval_capacity_factor is 1.0"),
    ],
)
def test_a_sparse_model_that_answers_otherwise_is_warned_of(dense, caplog, fields, said):
    upcycle(dense, layers="dense", **fields)
    found = [record.getMessage() for record in caplog.records if record.name == "moellava.building.dense_to_sparse"]
    assert [said in message for message in found] == ([] if said is None else [True])


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_a_real_model_in_bf16_answers_as_before(smollm2, parts, k):
    dense = load_pretrained_model(smollm2, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    assert dense.dtype == torch.bfloat16
    sparse = upcycle(dense, num_experts=2, num_experts_per_tok=k, layers="dense")
    inputs = dense.processor.tokenizer("The capital of France is", return_tensors="pt")
    assert torch.equal(sparse(**inputs).logits, dense(**inputs).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(sparse.generate(**inputs, **options), dense.generate(**inputs, **options))


def test_what_a_sparse_checkpoint_says_itself_may_be_repeated(sparse_folder):
    moe = {"num_experts": 8, "layers": "second_half", "use_residual": False, "router_bias": False}
    loaded = load_pretrained_model(sparse_folder, moe_config=moe, device="cpu").model
    assert loaded.config.to_dict() == load_pretrained_model(sparse_folder, device="cpu").model.config.to_dict()
    loaded = load_pretrained_model(sparse_folder, moe_config={}, device="cpu").model
    assert loaded.config.moe_config.num_experts == 8


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_experts": 4}, "The checkpoint's num_experts is 8, and 4 is asked for"),
        ({"layers": "sparse"}, r"The checkpoint's layers is \[2, 3\], and \[0, 2\] is asked for"),
        ({"use_residual": True}, "use_residual is False, and True is asked for"),
        ({"use_meta_expert": True}, "use_meta_expert is False"),
        ({"router_bias": True}, "router_bias is False"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 of num_experts 8"),
        ({"router_path": "router.pth"}, "router_path is 'router.pth', but the checkpoint is sparse already"),
        ({"num_expert": 8}, "Unknown field 'num_expert' in moe_config.*num_experts"),
    ],
)
def test_what_a_sparse_checkpoint_is_not_loaded_with(sparse_folder, moe, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(sparse_folder, moe_config=moe, device="cpu")


def test_an_adapters_base_is_loaded_with_moe_config(dense, dense_folder, sparse_folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_pretrained_model(sparse_folder, device="cpu").model
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    loaded = load_pretrained_model(tmp_path, model_base=sparse_folder, moe_config={"min_capacity": 3}, device="cpu")
    assert loaded.model.config.moe_config.min_capacity == 3


# ---------------------------------------------------------------------------------------------------------------------
# Router files
# ---------------------------------------------------------------------------------------------------------------------


def router_tensors(bias: bool = True, experts: int = 4, width: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {"fc1.weight": torch.randn(experts, width, generator=generator) * 0.2}
    return tensors | ({"fc1.bias": torch.randn(experts, generator=generator)} if bias else {})


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize("bias", [True, False])
def test_router_file(dense, dense_folder, tmp_path, suffix, bias):
    path, tensors = tmp_path / f"router.{suffix}", router_tensors(bias)
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    models = [
        upcycle(dense, layers="dense", router_path=path),
        upcycle(dense_folder, layers="dense", router_path=str(path)),
        load_pretrained_model(dense_folder, moe_config={"layers": "dense", "router_path": path}, device="cpu").model,
    ]
    for model in models:
        assert model.config.moe_config.router_bias == bias
        assert len(blocks_of(model)) == 4
        for block in blocks_of(model).values():
            assert torch.equal(block.gate.weight, tensors["fc1.weight"])
            assert torch.equal(block.gate.bias, tensors["fc1.bias"]) if bias else block.gate.bias is None
    pointers = {block.gate.weight.data_ptr() for block in blocks_of(models[0]).values()}
    assert len(pointers) == 4
    assert "router_path" not in json.dumps(models[0].config.to_dict())


def test_med_moe(dense, tmp_path):
    """One expert of a frozen router that was trained beforehand, and the shared one, added with weight 1."""
    torch.save(router_tensors(), tmp_path / "phi_router.pth")
    sparse = upcycle(
        dense, num_experts=4, num_experts_per_tok=1, use_meta_expert=True, freeze_router=True, router_aux_loss_coef=0,
        router_path=tmp_path / "phi_router.pth",
    )  # fmt: skip
    inputs = with_pictures(dense)
    with torch.no_grad():
        assert relative_error(sparse(**inputs).logits, said_by_formula(dense, sparse, inputs)) < 1e-5
    sparse.train()
    sparse(**inputs, labels=inputs["input_ids"]).loss.backward()
    for block in blocks_of(sparse).values():
        assert block.gate.weight.grad is None
        assert block.gate.bias.grad is None
        assert block.meta_expert.up_proj.weight.grad.abs().max() > 0
        assert block.experts.down_proj.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (router_tensors(experts=3), {}, r"has the shape \(3, 64\); the model needs \(4, 64\)"),
        (router_tensors(width=32), {}, r"has the shape \(4, 32\); the model needs \(4, 64\)"),
        (router_tensors(), {"router_bias": False}, "router_bias is False, but the router of .* says otherwise"),
        (router_tensors(False), {"router_bias": True}, "router_bias is True, but the router of .* says otherwise"),
        ({"fc1.bias": torch.zeros(4)}, {}, r"is no router: expected fc1.weight.*found fc1.bias \(4,\)"),
        ({"fc1.weight": torch.zeros(4)}, {}, "is no router"),
        (router_tensors() | {"fc2.weight": torch.zeros(4, 64)}, {}, "is no router.*fc2.weight"),
        (router_tensors() | {"fc1.scale": torch.zeros(4)}, {}, "is no router.*fc1.scale"),
        (router_tensors(False) | {"fc1.bias": torch.zeros(3)}, {}, r"a bias of the shape \(3,\); expected \(4,\)"),
    ],
)
def test_router_files_that_do_not_fit(dense, tmp_path, tensors, fields, message):
    torch.save(tensors, tmp_path / "router.pth")
    with pytest.raises(ValueError, match=message):
        upcycle(dense, router_path=tmp_path / "router.pth", **fields)


def test_router_files_that_cannot_be_read(dense, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no router file .*missing.pth"):
        upcycle(dense, router_path=tmp_path / "missing.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="truncated or damaged"):
        upcycle(dense, router_path=tmp_path / "cut.safetensors")
    torch.save(torch.nn.Linear(64, 4), tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="Python objects other than tensors"):
        upcycle(dense, router_path=tmp_path / "pickle.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Names and values of the fields
# ---------------------------------------------------------------------------------------------------------------------


def test_older_names():
    """The `moe` dictionary of a MoE-LLaVA checkpoint as it stands."""
    older = {
        "moe_enable": True, "moe_mode": "second_half", "moe_layers_idx": [0, 2], "num_experts": [4, 4], "ep_size": 1,
        "top_k_experts": 2, "capacity_factor": 1.5, "eval_capacity_factor": 2.0, "min_capacity": 0,
        "use_residual": False, "router_aux_loss_coef": 0.01, "train_modules": ["fc1", "fc2", "wg"],
    }  # fmt: skip
    moe = MoellavaMoeConfig(**older)
    assert (moe.num_experts, moe.num_experts_per_tok, moe.layers) == (4, 2, [0, 2])
    assert (moe.capacity_factor, moe.eval_capacity_factor, moe.min_capacity) == (1.5, 2.0, 0)
    config = MoellavaConfig(moe_config=older)
    moe.resolve(config.text_config.num_hidden_layers)
    assert config.moe_config.to_dict() == moe.to_dict()
    assert MoellavaConfig(moe_config={"moe_mode": "first_half"}).moe_config.layers == list(range(16))
    assert MoellavaMoeConfig(top_k=1).num_experts_per_tok == 1


def test_older_names_in_upcycle(dense, dense_folder):
    for given in (dense, dense_folder):
        moe = upcycle(given, top_k_experts=1, moe_mode="dense", num_experts=[2, 2, 2, 2], ep_size=1).config.moe_config
        assert (moe.num_experts, moe.num_experts_per_tok, moe.layers) == (2, 1, [0, 1, 2, 3])


def test_config_round_trip(tmp_path):
    fields = {
        "num_experts": 6, "num_experts_per_tok": 2, "layers": [-1, 3, 3], "norm_topk_prob": False, "router_bias": True,
        "freeze_router": True, "router_aux_loss_coef": 0.25, "router_jitter_noise": 0.1, "sample_second_expert": True,
        "capacity_factor": 1.25, "eval_capacity_factor": 2, "min_capacity": 3, "use_residual": True,
        "use_meta_expert": True, "output_router_logits": True,
    }  # fmt: skip
    config = MoellavaConfig(moe_config=fields)
    assert config.moe_config.layers == [3, 31]
    assert {name: getattr(config.moe_config, name) for name in fields} == fields | {"layers": [3, 31]}
    for _ in range(2):
        config.save_pretrained(tmp_path)
        again = MoellavaConfig.from_pretrained(tmp_path)
        assert again.moe_config.to_dict() == config.moe_config.to_dict()
        config = MoellavaConfig.from_dict(again.to_dict())
    stored = json.loads((tmp_path / "config.json").read_text())["moe_config"]
    assert {name: stored[name] for name in fields} == fields | {"layers": [3, 31]}
    dense = MoellavaConfig()
    dense.save_pretrained(tmp_path)
    assert MoellavaConfig.from_pretrained(tmp_path).moe_config is None


def test_a_config_that_is_used_twice():
    moe = MoellavaMoeConfig(layers="second_half")
    deep = MoellavaConfig(moe_config=moe)
    shallow = MoellavaConfig(moe_config=moe, text_config=LlamaConfig(num_hidden_layers=4, vocab_size=32064))
    assert deep.moe_config.layers == list(range(16, 32))
    assert shallow.moe_config.layers == [2, 3]
    assert moe.layers == "second_half"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0, "num_experts_per_tok": 0}, "num_experts_per_tok is 0 of num_experts 0"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3 of num_experts 2"),
        ({"num_experts": [4, 2]}, r"num_experts is \[4, 2\]; every sparse layer has the same"),
        ({"num_experts": "four"}, "num_experts"),
        ({"layers": "middle"}, "Unknown choice of layers 'middle'"),
        ({"layers": [0, 4]}, r"layers is \[0, 4\], but the language model has the layers 0 to 3"),
        ({"layers": []}, r"layers is \[\]"),
        ({"capacity_factor": 0}, "capacity_factor is 0"),
        ({"eval_capacity_factor": float("inf")}, "eval_capacity_factor is inf"),
        ({"min_capacity": -1}, "min_capacity is -1"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
        ({"router_jitter_noise": 1.0}, "router_jitter_noise is 1.0"),
        ({"num_experts_per_tok": 1, "sample_second_expert": True}, "sample_second_expert needs num_experts_per_tok=2"),
        ({"experts": 4}, "Unknown field 'experts' in moe_config"),
        ({"num_experts_per_tok": 3, "top_k_experts": 1}, "num_experts_per_tok"),
        ({"top_k": 1, "top_k_experts": 2}, "twice"),
        ({"top_k": 2, "top_k_experts": 1}, "twice"),
        ({"moe_enable": False}, "moe_enable is False"),
        ({"moe_enable": 0}, "moe_enable is 0"),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense(dense, dense_folder, fields, message):
    for given in (dense, dense_folder):
        with pytest.raises(ValueError, match=message):
            upcycle(given, **fields)
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(dense_folder, moe_config=fields, device="cpu")
    with pytest.raises(ValueError, match=message):
        MoellavaConfig(moe_config=fields, text_config=dense.config.text_config, image_token_id=3)


def test_no_layer_at_all():
    config = LlamaConfig(num_hidden_layers=1, vocab_size=32064)
    with pytest.raises(ValueError, match="layers is 'first_half', which is none of a language model's 1 layers"):
        MoellavaConfig(text_config=config, moe_config={"layers": "first_half"})
    assert MoellavaConfig(text_config=config, moe_config={"layers": "second_half"}).moe_config.layers == [0]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be upcycled
# ---------------------------------------------------------------------------------------------------------------------


def test_a_sparse_model_is_not_upcycled_again(dense, sparse_folder, tmp_path):
    message = r"sparse already: layers \[2, 3\] have 8 experts. Upcycle the dense model"
    sparse = load_pretrained_model(sparse_folder, device="cpu").model
    for given in (sparse, sparse_folder):
        for fields in ({}, {"num_experts": 8, "layers": "second_half"}):
            with pytest.raises(ValueError, match=message):
                upcycle(given, **fields)


def test_what_is_no_model_of_this_package(parts, dense, tmp_path):
    own = AutoModelForCausalLM.from_pretrained(parts.language_model("llama"))
    with pytest.raises(TypeError, match="A LlamaForCausalLM cannot be upcycled; expected a MoellavaForCausalLM"):
        upcycle(own)
    with pytest.raises(TypeError, match="A NoneType cannot be upcycled"):
        upcycle(None)
    assert isinstance(dense.model, MoellavaModel)
    with pytest.raises(TypeError, match="A model without its head"):
        upcycle(dense.model)
    with pytest.raises(ValueError, match="is a model of type 'llama', not a checkpoint of this package"):
        upcycle(parts.language_model("llama"))
    with pytest.raises(FileNotFoundError):
        upcycle(tmp_path / "missing")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("opt", "A opt language model cannot be made sparse: its layer 0 keeps its MLP in no module of its own"),
        ("bloom", "A BloomMLP cannot be made sparse: its activation is not known"),
    ],
)
def test_families_without_such_an_mlp(parts, dense_of, family, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense_of(family))
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(
            parts.language_model(family), mm_vision_tower=parts.vision_tower("clip"), device="cpu", moe_config={}
        )


def test_an_mlp_with_arithmetic_of_its_own(dense, monkeypatch):
    """It has all parts of a known form, and does more with them."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 0.9 * forward(self, x))
    with pytest.raises(ValueError, match="A LlamaMLP cannot be made sparse: it computes something else than experts"):
        upcycle(dense)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x, residual: forward(self, x) + residual)
    with pytest.raises(ValueError, match="A LlamaMLP cannot be made sparse: it could not be run for comparison"):
        upcycle(dense)


def test_weights_that_are_not_in_memory(dense, dense_folder, tmp_path):
    devices = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    model = AutoModelForCausalLM.from_pretrained(dense_folder, device_map=devices, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="are not in memory but offloaded to disk"):
        upcycle(model)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_not_upcycled(dense_folder):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(ValueError, match="a quantised model cannot be upcycled. Load it without quantisation"):
        upcycle(model)


def test_weights_that_are_missing(dense, dense_folder, tmp_path):
    weights = load_file(dense_folder / "model.safetensors")
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    del weights[name]
    for path in dense_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights \['up_proj.weight'\] of model.language_model.layers.2.mlp"):
        upcycle(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that a checkpoint lacks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_missing_weights_are_initialised(dense_of, tmp_path, family):
    """Not left as memory was: drawn as the language model's family draws its own, while those that are there stay."""
    fields = {"router_bias": True, "use_residual": True, "use_meta_expert": True, "num_experts": 6}
    sparse = upcycle(dense_of(family), layers=[0, 1, 3], **fields)
    sparse.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = {name for name in weights if "layers.1.mlp.experts." in name or "layers.1.mlp.gate." in name}
    removed |= {name for name in weights if "layers.3.mlp.experts.down_proj" in name}
    removed |= {name for name in weights if "layers.3.mlp.coefficient" in name}
    assert len(removed) >= 7
    kept = {name: tensor for name, tensor in weights.items() if name not in removed}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
        assert set(report["missing_keys"]) == removed
        state = model.state_dict()
        for name in removed:
            if name.endswith("bias"):
                assert (state[name] == 0).all(), name
            else:
                assert 0.17 < state[name].float().std() < 0.23 or state[name].numel() < 400, name
                assert 0.1 < state[name].float().std() < 0.3, name
                assert abs(state[name].float().mean()) < 0.1, name
        for name, tensor in kept.items():
            # routers keep their precision
            kept_dtype = torch.float32 if ".mlp.gate." in name or ".mlp.coefficient." in name else dtype
            assert torch.equal(state[name], tensor.to(kept_dtype)), name
        with torch.no_grad():
            assert model(**with_pictures(dense_of(family))).logits.isfinite().all()


def test_a_model_of_a_config_is_initialised(dense_of):
    config = copy.deepcopy(upcycle(dense_of("phi"), router_bias=True, use_residual=True).config)
    model = MoellavaForCausalLM(config)
    for block in blocks_of(model).values():
        assert 0.17 < block.experts.up_proj.std() < 0.23
        assert 0.17 < block.experts.down_proj.std() < 0.23
        assert 0.1 < block.gate.weight.std() < 0.3
        for bias in (block.experts.up_proj_bias, block.experts.down_proj_bias, block.gate.bias):
            assert (bias == 0).all()
    expert = blocks_of(model)[0].experts.up_proj
    assert not torch.equal(expert[0], expert[1])


# ---------------------------------------------------------------------------------------------------------------------
# How large it is
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_inspect_tells_total_and_active_parameters(dense_of, tmp_path, family):
    dense = dense_of(family)
    sparse = upcycle(
        dense, num_experts=8, num_experts_per_tok=2, layers="sparse", use_meta_expert=True, router_bias=True
    )
    sparse.save_pretrained(tmp_path)
    summary = inspect_checkpoint(tmp_path)
    assert summary.sparse.num_experts == 8
    assert summary.sparse.num_experts_per_tok == 2
    assert summary.sparse.layers == [0, 2]
    own = {id(parameter): parameter.numel() for parameter in sparse.parameters()}
    assert summary.parameters.total == sum(own.values())
    mlp = sum(p.numel() for p in dense.model.language_model.layers[0].mlp.parameters())
    # Of each of the two layers' eight experts, two are passed through.
    assert summary.parameters.active == summary.parameters.total - 2 * 6 * mlp
    dense.save_pretrained(tmp_path / "dense")
    summary = inspect_checkpoint(tmp_path / "dense")
    assert summary.sparse is None
    assert summary.parameters.active == summary.parameters.total
