from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.sampling.outliers import layer_outlier_ratios, layer_weight_norms
from tests.tiny import ARCHITECTURES, KINDS, tiny_batch, tiny_model

Batch = dict[str, Tensor]
EXPERTS = [name for name in ARCHITECTURES if name in ("mixtral", "qwen2_moe", "qwen3_moe")]
DENSE = [name for name in ARCHITECTURES if name not in EXPERTS]


def brute_force_ratio(model: PreTrainedModel, block: nn.Module, batches: list[Batch], threshold: float) -> float:
    """D_l by the formula: keeps every activation of the block and builds every A as a whole."""
    weights: dict[object, Tensor] = {}  # each as (out, in)
    inputs: dict[object, list[Tensor]] = defaultdict(list)  # X of each weight, in parts of (tokens, in)

    def on_linear(module: nn.Module, args: tuple[Tensor]) -> None:
        weights[module] = module.weight.T if isinstance(module, Conv1D) else module.weight
        inputs[module].append(args[0].flatten(0, -2))

    def on_experts(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden_states, chosen, _ = args
        for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            if module.is_transposed:
                gate_up, down = gate_up.T, down.T
            x = hidden_states[(chosen == expert).any(-1)]
            bias = module.gate_up_proj_bias[expert] if module.has_bias else 0
            weights[module, expert, "gate_up"], weights[module, expert, "down"] = gate_up, down
            inputs[module, expert, "gate_up"].append(x)
            inputs[module, expert, "down"].append(module._apply_gate(x @ gate_up.T + bias))

    handles = []
    for module in block.modules():
        if isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith("Router"):
            handles.append(module.register_forward_pre_hook(on_linear))
        elif type(module).__name__.endswith("Experts"):
            handles.append(module.register_forward_pre_hook(on_experts))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
            if "attention_mask" in batch and not batch["attention_mask"].all():
                for parts in inputs.values():
                    parts[-1] = parts[-1][batch["attention_mask"].flatten().bool()]
    for handle in handles:
        handle.remove()

    x_norms = {key: torch.cat(parts).float().square().sum(0).sqrt() for key, parts in inputs.items()}
    pooled = torch.cat([(x_norms[key] * weight.detach().float().abs()).flatten() for key, weight in weights.items()])
    return 100 * (pooled > threshold * pooled.double().mean()).double().mean().item()


def brute_force_ratios(model: PreTrainedModel, batches: list[Batch], threshold: float) -> list[float]:
    """D_l of every block; batches with padding are for models without experts."""
    return [brute_force_ratio(model, block, batches, threshold) for block in decoder_layers(model)]


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the blocks differ and gives them outliers, as trained weights have them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, block in enumerate(decoder_layers(model)):
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    boost = torch.rand(parameter.shape, generator=generator) < 0.002 * (index + 1)
                    parameter.mul_(torch.where(boost, 40.0, 1.0).to(parameter.dtype) * 3)
    return model


def padded_batch(side: str, seed: int = 0) -> Batch:
    batch = tiny_batch(rows=4, length=12, seed=seed)
    del batch["labels"]
    for row, length in enumerate((12, 5, 9, 1)):
        padding = slice(length, None) if side == "right" else slice(None, 12 - length)
        batch["attention_mask"][row, padding] = 0
        batch["input_ids"][row, padding] = 0
    return batch


def assert_differ(ratios: Tensor) -> None:
    """Guards the tests above it: equal or empty scores could not tell right from wrong."""
    assert len(ratios.unique()) > 2
    assert (ratios > 0.05).all()
    assert (ratios < 50).all()


@pytest.mark.parametrize("threshold", [2.0, 13.0])
@pytest.mark.parametrize("architecture", [*KINDS, "mixtral", "qwen2_moe"])
def test_equals_brute_force(architecture: str, threshold: float) -> None:
    model = spread(tiny_model(architecture))
    batches = [tiny_batch(seed=0), tiny_batch(rows=1, length=9, seed=1)]
    ratios = layer_outlier_ratios(model, batches, threshold)
    assert ratios.dtype == torch.float64
    assert ratios.tolist() == pytest.approx(brute_force_ratios(model, batches, threshold), rel=1e-4)
    assert_differ(ratios)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_equals_brute_force_in_bfloat16(architecture: str) -> None:
    model = spread(tiny_model(architecture, dtype=torch.bfloat16))
    if architecture in EXPERTS:
        model.set_experts_implementation("eager")  # others round differently, which later blocks see
    batches = [tiny_batch(rows=8, length=64)]
    for threshold in (2.0, 13.0):  # at the lower one more weights are close enough to show a norm that was rounded
        ratios = layer_outlier_ratios(model, batches, threshold)
        assert ratios.tolist() == pytest.approx(brute_force_ratios(model, batches, threshold), rel=1e-4)
        assert_differ(ratios)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", DENSE)
def test_padding_is_left_out(architecture: str, side: str) -> None:
    model = spread(tiny_model(architecture))
    batch = padded_batch(side)
    ratios = layer_outlier_ratios(model, [batch], 3.0)
    assert ratios.tolist() == pytest.approx(brute_force_ratios(model, [batch], 3.0), rel=1e-4)
    assert not torch.equal(ratios, layer_outlier_ratios(model, [{"input_ids": batch["input_ids"]}], 3.0))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_padding_is_left_out_of_what_experts_see(architecture: str, side: str) -> None:
    model = spread(tiny_model(architecture))
    batch = padded_batch(side)
    rows = [
        {"input_ids": ids[mask.bool()][None]} for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    ratios = layer_outlier_ratios(model, [batch], 3.0)
    assert ratios.tolist() == pytest.approx(brute_force_ratios(model, rows, 3.0), rel=1e-4)
    assert not torch.equal(ratios, layer_outlier_ratios(model, [{"input_ids": batch["input_ids"]}], 3.0))


def test_an_expert_that_sees_no_token_counts_with_norm_zero() -> None:
    model = spread(tiny_model("mixtral", num_local_experts=32))
    batch = tiny_batch(rows=1, length=3)  # 3 tokens with 2 experts each reach 6 of 32 experts at most
    ratios = layer_outlier_ratios(model, [batch], 13.0)
    assert ratios.tolist() == pytest.approx(brute_force_ratios(model, [batch], 13.0), rel=1e-4)


def test_experts_with_transposed_weights_and_biases() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 128, "head_dim": 8}
    counts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes, **counts)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ratios = layer_outlier_ratios(model, [tiny_batch()], 3.0)
    assert ratios.tolist() == pytest.approx(brute_force_ratios(model, [tiny_batch()], 3.0), rel=1e-4)
    block = decoder_layers(model)[0]
    matrices = [p.detach().flatten() for n, p in block.named_parameters() if p.dim() > 1 and not n.endswith("bias")]
    assert layer_weight_norms(model)[0].item() == pytest.approx(torch.cat(matrices).norm().item(), rel=1e-5)


def test_a_planted_outlier_is_found_in_its_block() -> None:
    model = tiny_model("llama")
    before = layer_outlier_ratios(model, [tiny_batch()])
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        weight[5, 7] = 1000 * weight.abs().mean()
    after = layer_outlier_ratios(model, [tiny_batch()])
    num_weights = sum(p.numel() for p in model.model.layers[2].parameters() if p.dim() == 2)
    assert before.tolist() == [0, 0, 0, 0]
    assert after.tolist() == pytest.approx([0, 0, 100 / num_weights, 0])


def test_biases_do_not_count() -> None:
    model = spread(tiny_model("gpt2"))
    before = layer_outlier_ratios(model, [tiny_batch()], 3.0)
    # A bias of the last matrix of the last block is behind every activation that is measured.
    model.transformer.h[-1].mlp.c_proj.bias.data.fill_(1e6)
    assert torch.equal(before, layer_outlier_ratios(model, [tiny_batch()], 3.0))


def test_packed_documents_are_read_by_their_positions() -> None:
    model = spread(tiny_model("llama"))
    model.set_attn_implementation("eager")
    first, second = tiny_batch(rows=1, length=7, seed=1), tiny_batch(rows=1, length=5, seed=2)
    packed = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1),
        "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None],
    }
    apart = layer_outlier_ratios(model, [first, second], 3.0)
    assert layer_outlier_ratios(model, [packed], 3.0).tolist() == pytest.approx(apart.tolist(), rel=1e-4)
    assert not torch.equal(apart, layer_outlier_ratios(model, [{"input_ids": packed["input_ids"]}], 3.0))


def test_works_inside_another_module() -> None:
    model = spread(tiny_model("llama"))
    wrapper = nn.ModuleDict({"inner": model})
    assert torch.equal(layer_outlier_ratios(wrapper, [tiny_batch()]), layer_outlier_ratios(model, [tiny_batch()]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_adapters_do_not_count(architecture: str) -> None:
    peft = pytest.importorskip("peft")
    model = spread(tiny_model(architecture))
    ratios, norms = layer_outlier_ratios(model, [tiny_batch()], 3.0), layer_weight_norms(model)
    matrices = sum(p.dim() > 1 for p in model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    assert sum(p.dim() > 1 for p in adapted.parameters()) > matrices
    assert torch.equal(ratios, layer_outlier_ratios(adapted, [tiny_batch()], 3.0))
    assert torch.equal(norms, layer_weight_norms(adapted))


def model_state(model: PreTrainedModel) -> dict[str, object]:
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_pre_hooks), len(module._forward_pre_hooks_with_kwargs), len(module._forward_hooks))
            for module in model.modules()
        ],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "weights": [parameter.detach().clone().tolist() for parameter in model.parameters()],
        "experts": model.config._experts_implementation,
        "use_cache": model.config.use_cache,
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_model_comes_back_as_it_was(architecture: str, fails: bool) -> None:
    model = tiny_model(architecture, attention_dropout=0.5)
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    before = model_state(model)

    def batches() -> Iterator[Batch]:
        yield tiny_batch()
        if fails:
            raise OSError("the disk is gone")

    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            layer_outlier_ratios(model, batches())
    else:
        # Dropout is off, though the model is in training mode.
        assert torch.equal(layer_outlier_ratios(model, batches(), 2.0), layer_outlier_ratios(model, batches(), 2.0))
    assert model_state(model) == before
    assert model(**tiny_batch()).loss.requires_grad


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.usefixtures("process_group")
def test_sharded_weights_score_the_same(architecture: str) -> None:
    model = spread(tiny_model(architecture))
    norms, ratios = layer_weight_norms(model), layer_outlier_ratios(model, [tiny_batch()], 3.0)
    mesh = init_device_mesh("cpu", (1,))
    for block in decoder_layers(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(ratios, layer_outlier_ratios(model, [tiny_batch()], 3.0))
    assert torch.equal(norms, layer_weight_norms(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_weight_norms_pool_the_matrices_of_a_block(architecture: str) -> None:
    model = spread(tiny_model(architecture))
    expected = [
        torch.cat([p.detach().double().flatten() for p in block.parameters() if p.dim() > 1]).norm().item()
        for block in decoder_layers(model)
    ]
    norms = layer_weight_norms(model)
    assert norms.dtype == torch.float64
    assert norms.tolist() == pytest.approx(expected, rel=1e-5)
    assert layer_weight_norms(model.double()).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_not_positive_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match=r"^threshold: .* is not a positive number"):
        layer_outlier_ratios(tiny_model("llama"), [tiny_batch()], threshold)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_no_text_is_refused(architecture: str) -> None:
    only_padding = tiny_batch()
    only_padding["attention_mask"].zero_()
    for batches in ([], [only_padding]):
        with pytest.raises(UsageError, match=r"^calibration_samples: there is no text"):
            layer_outlier_ratios(tiny_model(architecture), batches)


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(UsageError, match=r"^calibration_samples: block 1 has activations that are not finite"):
        layer_outlier_ratios(model, [tiny_batch()])


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), requires_grad=False)
    for scores in (partial(layer_outlier_ratios, batches=[tiny_batch()]), layer_weight_norms):
        with pytest.raises(UsageError, match=r"^sampling: the weights are quantised, .* give sampling.scores"):
            scores(model)


def test_blocks_without_weights_have_no_outliers() -> None:
    model = tiny_model("llama")
    layers = decoder_layers(model)
    layers[1] = Skip()
    layers[2].unused = nn.Linear(0, 4)
    for p in layers[3].parameters():
        p.data.zero_()  # of which none is above the mean
    ratios = layer_outlier_ratios(model, [tiny_batch()], threshold=2.0)
    assert (ratios > 0).tolist() == [True, False, True, False]
    assert layer_weight_norms(model)[1] == 0


class Skip(nn.Module):
    """A block that was pruned away: it hands its input on."""

    attention_type = "full_attention"

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states
