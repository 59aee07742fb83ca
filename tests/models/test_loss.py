"""The chunked loss against transformers' own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from transformers import masking_utils

from ows_lightning.compat import known_mask_checks
from ows_lightning.models import loss
from ows_lightning.models.loss import loss_and_predictions, next_token_loss, precompute_on_host
from tests.models.architectures import tiny_config
from tests.models.architectures import tiny_model as tiny_architecture
from tests.tiny import KINDS, tiny_batch, tiny_model


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 5 * 128 * 4)  # five rows of logits at a time


def batch_with_prompt() -> dict[str, torch.Tensor]:
    batch = tiny_batch(rows=3, length=16)
    batch["labels"][:, :5] = -100
    batch["labels"][1] = -100
    return batch


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", KINDS)
def test_loss_and_gradients_are_the_models_own(architecture: str, tied: bool) -> None:
    model, batch = tiny_model(architecture, tie_word_embeddings=tied).eval(), batch_with_prompt()
    total, count = next_token_loss(model, batch)
    assert count == 22
    (total / count).backward()
    ours = gradients(model)
    expected = model(**batch).loss
    expected.backward()
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-6)
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_of_gradients_are_refused_not_wrong() -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="without create_graph"):
        torch.autograd.grad(next_token_loss(model, tiny_batch())[0], model.model.norm.weight, create_graph=True)
    total, _ = next_token_loss(model, tiny_batch())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


@pytest.mark.parametrize(
    ("kind", "change"),
    [("gemma2", {"final_logit_softcapping": 0.5}), ("cohere", {"logit_scale": 3.0}), ("granite", {"logits_scaling": 3.0})],
)
def test_capped_and_scaled_logits(kind: str, change: dict[str, float]) -> None:
    config = tiny_config(kind)
    config.update(change)
    model = tiny_architecture(config).eval()
    total, count = next_token_loss(model, batch_with_prompt())
    torch.testing.assert_close(total / count, model(**batch_with_prompt()).loss)
    (evaluated, _), _ = loss_and_predictions(model, batch_with_prompt())
    torch.testing.assert_close(evaluated, total.detach())


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_lets_the_head_learn() -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    next_token_loss(model, tiny_batch())[0].backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad is not None
    model.zero_grad()
    model.requires_grad_(False).lm_head.requires_grad_(True)
    next_token_loss(model, tiny_batch())[0].backward()
    assert set(gradients(model)) == {"lm_head.weight"}


def test_without_targets_the_loss_is_zero_and_harmless() -> None:
    model, batch = tiny_model("llama"), tiny_batch()
    batch["labels"][:] = -100
    total, count = next_token_loss(model, batch)
    total.backward()
    assert (total, count) == (0, 0)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_evaluation_builds_no_graph_and_agrees() -> None:
    model = tiny_model("llama").eval()
    with torch.no_grad():
        evaluated, _ = next_token_loss(model, batch_with_prompt())
    trained, _ = next_token_loss(model, batch_with_prompt())
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, trained.detach())


def test_the_loss_is_float32_whatever_dtype_new_tensors_have() -> None:
    model, batch = tiny_model("llama", dtype=torch.bfloat16), tiny_batch()
    with torch.no_grad(), HalfPrecision("bf16-true").forward_context():  # as in a validation step
        expected, _ = next_token_loss(model, batch)
        (found, _), _ = loss_and_predictions(model, batch)
    trained, _ = next_token_loss(model, batch)
    assert found.dtype == trained.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(trained.detach(), expected)


def test_logits_of_a_whole_batch_never_exist() -> None:
    largest = 0

    def watch(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    model = tiny_model("llama")
    model.lm_head.register_forward_hook(watch)
    next_token_loss(model, tiny_batch(rows=8, length=32))[0].backward()
    assert 0 < largest * 4 <= loss.CPU_CHUNK_BYTES


def test_keys_and_values_are_not_kept_for_a_next_token() -> None:
    model, kept = tiny_model("llama"), []
    model.model.register_forward_hook(lambda module, args, output: kept.append(output.past_key_values))
    next_token_loss(model, tiny_batch())
    assert kept == [None]


def test_a_gpus_chunk_has_rows_enough_to_hide_that_the_head_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = tiny_model("llama", vocab_size=20_000, hidden_size=8, max_position_embeddings=2001)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))

    def chunks(chunks_of: str) -> list[int]:
        rows.clear()
        next_token_loss(model, tiny_batch(1, 2001), torch.device(chunks_of))[0].backward()
        return list(rows)

    assert chunks("cpu") == [419, 419, 419, 419, 324]  # 32 MB
    assert chunks("cuda") == [1024, 976]
    monkeypatch.setattr(loss, "GPU_CHUNK_BYTES", 500 * 20_000 * 4)
    assert chunks("cuda") == [500, 500, 500, 500]


def test_what_a_thread_knows_of_its_masks_is_no_other_threads() -> None:
    """As where a second training, or a server, runs in the same process."""
    hides = torch.tensor([[True, False]])
    with known_mask_checks(padded=False, packed=False), ThreadPoolExecutor(1) as other:
        assert masking_utils.fast_all(hides)
        assert not other.submit(masking_utils.fast_all, hides).result()
    assert not masking_utils.fast_all(hides)


@pytest.mark.parametrize("architecture", KINDS)
def test_what_is_seen_on_the_host_changes_no_bit(architecture: str) -> None:
    padded, packed = batch_with_prompt(), {k: v for k, v in tiny_batch().items() if k != "attention_mask"}
    packed["position_ids"] = torch.arange(16).remainder(9).expand(3, -1).clone()
    padded["attention_mask"][0, 10:], padded["labels"][0, 10:] = 0, -100
    batches = [tiny_batch(), padded]
    if architecture in ("llama", "gemma2", "qwen3_moe"):  # with sliding windows, and without
        batches.append(packed)
    for batch in batches:
        one, other = tiny_model(architecture).eval(), tiny_model(architecture).eval()
        losses = [next_token_loss(one, batch), next_token_loss(other, precompute_on_host(batch))]
        assert torch.equal(losses[0][0], losses[1][0])
        assert losses[0][1] == losses[1][1]
        for total, _ in losses:
            total.backward()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_a_heads_gradient_is_added_up_in_one_place(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied, vocab_size=512)
    size = model.lm_head.weight.numel() * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        next_token_loss(model, tiny_batch())[0].backward()
    assert sum(event.self_cpu_memory_usage >= size for event in profile.events()) == 2  # of the head, and of the embeddings


class AdaptedHead(nn.Linear):
    """Computes more than one product of its weight, as an adapter would."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 2 * super().forward(hidden)


def test_a_head_with_an_adapter() -> None:
    model = tiny_model("llama").eval()
    model.lm_head.__class__ = AdaptedHead
    total, count = next_token_loss(model, batch_with_prompt())
    (total / count).backward()
    ours = gradients(model)
    model(**batch_with_prompt()).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_mixed_precision_keeps_the_gradient_of_the_head_in_float32() -> None:
    model = tiny_model("llama").eval()
    total, count = next_token_loss(model, batch_with_prompt())
    (total / count).backward()
    exact = gradients(model)["lm_head.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        total, count = next_token_loss(model, batch_with_prompt())
    (total / count).backward()
    mixed = gradients(model)["lm_head.weight"]
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0.02 * float(exact.abs().max()))  # bfloat16 has 8 bits


def test_a_target_of_no_probability_costs_what_its_logit_says() -> None:
    logits = torch.tensor([[0.0, 300.0, 1.0]])
    total = loss._cross_entropy_into_gradient_(logits, torch.tensor([0]))
    assert total == 300
    torch.testing.assert_close(logits, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_targets_of_a_page_locked_batch_are_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny_batch(2)
    locked = {id(batch["labels"])}  # as a GPU's loader has them

    def lock(tensor: Tensor) -> Tensor:
        locked.add(id(tensor))
        return tensor

    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: id(tensor) in locked)
    monkeypatch.setattr(Tensor, "pin_memory", lock)
    assert id(precompute_on_host(batch)["targets_at"]) in locked
    locked.clear()
    precompute_on_host(batch)
    assert not locked
