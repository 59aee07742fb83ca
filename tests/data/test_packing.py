from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ows_lightning.data.packing import pack, require_separate_documents
from ows_lightning.data.rows import collate, join_documents
from ows_lightning.errors import UsageError
from ows_lightning.models.loss import token_mask
from ows_lightning.sampling.outliers import layer_outlier_ratios
from tests.tiny import tiny_model

LENGTHS = [5, 1, 7, 4, 30, 3]
ROWS = [[0, 1, 2], [3, 4], [5]]


def documents() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(document, [-100, *document[1:]]) for document in ids]


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    labels = batch.pop("labels")
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("architecture", "attention", "window"),
    [
        ("llama", "sdpa", None),
        ("llama", "eager", None),
        ("gpt2", "sdpa", None),
        ("mistral", "sdpa", 6),
        ("gemma2", "eager", 6),
    ],
)
def test_packed_rows_give_the_loss_and_gradients_of_the_documents_apart(
    architecture: str, attention: str, window: int | None, flatten: bool
) -> None:
    settings = {"sliding_window": window} if window else {}
    model = tiny_model(architecture, attn_implementation=attention, **settings).eval()
    apart = collate([join_documents([document], packed=False) for document in documents()], pad_token_id=0)
    together = [join_documents([documents()[i] for i in row], packed=True) for row in ROWS]
    packed = collate(together, pad_token_id=0, flatten=flatten)
    assert "attention_mask" not in packed
    expected, gradients = loss_and_gradients(model, apart)
    loss, packed_gradients = loss_and_gradients(model, packed)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_rows_on_flash_attention() -> None:
    pytest.importorskip("flash_attn")
    settings = {"hidden_size": 256, "attn_implementation": "flash_attention_2", "dtype": torch.bfloat16}
    model = tiny_model("llama", **settings).cuda().eval()
    items = [join_documents([documents()[i] for i in row], packed=True) for row in ROWS]
    batch = {k: v.cuda() for k, v in collate(items, 0, flatten=True).items() if k != "labels"}
    logits = model(**batch, use_cache=False).logits[0]
    order = [i for row in ROWS for i in row]
    for part, i in zip(logits.split([LENGTHS[i] for i in order]), order, strict=True):
        alone = model(input_ids=torch.tensor([documents()[i][0]]).cuda(), use_cache=False).logits[0]
        torch.testing.assert_close(part, alone, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_documents_apart_are_accepted_as_they_were(
    architecture: str, flatten: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture).to(dtype)
    require_separate_documents(model, flatten)
    assert model.training


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("opt", torch.float32), ("bloom", torch.float32), ("opt", torch.bfloat16)]
)
def test_models_that_would_mix_documents_are_refused(architecture: str, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"^data.packing: .*Model would mix the documents of a row; set data.packing: false"):
        require_separate_documents(tiny_model(architecture).to(dtype), flatten=False)


def test_pack_fills_rows_and_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 513, (5000,), generator=generator).tolist()
    rows = pack(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(5000))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert max(totals) <= 512
    assert sum(totals) / (512 * len(rows)) > 0.99


def test_pack_puts_a_document_where_it_leaves_the_least_room() -> None:
    assert pack([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_the_padding_of_packed_rows_is_neither_counted_nor_scored(architecture: str) -> None:
    model, ids = tiny_model(architecture), [document for document, _ in documents() if len(document) > 1]
    rows = [join_documents([(document, document) for document in row], True) for row in (ids[:3], ids[3:4], ids[4:])]
    batch = collate(rows, pad_token_id=0)
    assert token_mask(batch).sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    apart = [collate([row], pad_token_id=0) for row in rows]
    torch.testing.assert_close(layer_outlier_ratios(model, [batch], 2.0), layer_outlier_ratios(model, apart, 2.0))
