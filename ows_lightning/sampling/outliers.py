"""Scores every decoder block by the share of outliers among its weights (OWS, arXiv 2405.18380; OWL, 2310.05175)."""

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ows_lightning.compat import own_parameters
from ows_lightning.errors import UsageError, command_line
from ows_lightning.models.causal_lm import eval_mode, run_causal_lm
from ows_lightning.models.decoder import decoder_layers, is_matrix, language_model_of, on_device
from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.models.loss import token_mask
from ows_lightning.models.plain_weights import full_tensor, weights_without_peft
from ows_lightning.optim.sharding import total_norm


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # hooks would make compiled blocks compile again
def layer_outlier_ratios(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], threshold: float = 13.0) -> Tensor:
    """Computes the outlier ratio D_l of every decoder block on calibration text (arXiv 2405.18380, equation 2).

    With X the inputs of a weight W over all tokens of the text, j an input feature and i an output feature,

        A_ij = ||X_j||_2 * |W_ij|
        D_l  = 100 * mean over all A of block l of [A > threshold * mean(A of block l)]

    The weights of a block are those of its `nn.Linear` and `Conv1D` modules, and the raw parameters that activations
    are multiplied with (experts, routers). An expert's norms run over the tokens that are routed to it. Biases and LoRA's
    adapters do not count. The model's mode, hooks and gradients stay as they were. Under FSDP2 all ranks pass equal batches.

    Args:
        model: A causal LM, or any module that contains one.
        batches: Batches with `input_ids` and, optionally, `attention_mask` (1 = token; padding is left out) and
            `position_ids`, each int64 of shape (batch, length), on any device.
        threshold: An A_ij is an outlier if it exceeds this many times the mean of its block (tau in the paper).

    Returns:
        Shape (num_layers,), float64 on the CPU, in percent.

    Raises:
        UsageError: `threshold` is not positive, there is no text, an activation is not finite, or there are no blocks.
    """
    if not 0 < threshold < math.inf:
        raise UsageError(f"threshold: {threshold} is not a positive number; give how many times the mean, e.g. 13")
    layers = decoder_layers(model)
    blocks = [_block_weights(block) for block in layers]
    _measure_inputs(model, layers, blocks, batches)
    ratios = []
    for index, weights in enumerate(blocks):
        with on_device(layers[index]):
            ratios.append(_outlier_ratio(_used_weights(index, weights), threshold))
    return torch.tensor(ratios, dtype=torch.float64, device="cpu")


@torch.no_grad()
def layer_weight_norms(model: nn.Module) -> Tensor:
    """Computes the Frobenius norm of every decoder block's weights without biases: (num_layers,), float64 on the CPU."""
    norms = []
    for block in decoder_layers(model):
        with on_device(block):
            each = [total_norm([weight.full()]).item() for weight in _block_weights(block)]
        norms.append(math.hypot(*each))
    return torch.tensor(norms, dtype=torch.float64, device="cpu")


@dataclass(eq=False)
class _ScoredWeight:
    """A weight of a block, and the sum of squares of each of its input features over the text.

    It is found by its module and name, because FSDP2 puts another tensor there for every forward pass.
    """

    owner: nn.Module
    name: str
    transposed: bool = False  # (in, out) instead of (out, in)
    squares: Tensor | None = None  # float32, (in,) or (experts, in); None until an input was seen
    experts: int | None = None  # matrices that are concatenated into one, as in DBRX

    @property
    def is_raw_parameter(self) -> bool:
        return not isinstance(self.owner, (nn.Linear, Conv1D))

    @property
    def parameter(self) -> Tensor:
        return getattr(self.owner, self.name)

    def full(self) -> Tensor:
        whole = full_tensor(self.parameter.detach())
        return whole if self.experts is None else whole.unflatten(0, (self.experts, -1))

    def add(self, squares: Tensor, expert: int | None = None) -> None:
        if self.squares is None:
            stack = self.parameter.shape[:-2] if self.experts is None else (self.experts,)
            self.squares = squares.new_zeros(*stack, squares.shape[-1])
        (self.squares if expert is None else self.squares[expert]).add_(squares)

    def magnitudes(self) -> Iterator[Tensor]:
        """Yields A = ||X_j|| * |W_ij| in float32, some rows at a time."""
        if self.parameter.numel() == 0:
            return
        matrices = self.full().mT if self.transposed else self.full()
        features = matrices.shape[-1]
        # A layer that never ran, such as an expert without tokens, has inputs of norm 0.
        squares = matrices.new_zeros(features, dtype=torch.float32) if self.squares is None else self.squares
        norms = squares.sqrt().to(matrices.device).reshape(-1, features)
        for matrix, norm in zip(matrices.reshape(-1, *matrices.shape[-2:]), norms, strict=True):
            for rows in matrix.split(rows_at_a_time(features, matrix.device)):
                yield (rows * norm).abs_()


def _block_weights(block: nn.Module) -> list[_ScoredWeight]:
    """Lists the matrices of a block: those of its linear modules, and raw parameters such as stacks of experts."""
    weights = []
    for _, module, name, _ in weights_without_peft(block):
        if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or name not in own_parameters(module):
            continue
        if not getattr(module, name).is_floating_point():
            hint = "give sampling.scores, a file of the model before it was quantised, or take uniform draws"
            raise UsageError(f"sampling: the weights are quantised, which no outliers can be seen in; {hint}")
        if is_matrix(name, getattr(module, name)) and getattr(module, name).dim() <= 3:
            weights.append(_ScoredWeight(module, name, transposed=isinstance(module, Conv1D)))
    return weights


def _used_weights(index: int, weights: list[_ScoredWeight]) -> list[_ScoredWeight]:
    """A block's weights without raw parameters that no matrix product used; a UsageError if an activation is not finite."""
    for weight in weights:
        if weight.is_raw_parameter and weight.squares is None and weight.parameter.dim() == 3:
            kind = type(weight.owner).__name__
            warnings.warn(f"block {index}: {kind}.{weight.name} is used in no matrix product and not scored", stacklevel=3)
    used = [weight for weight in weights if not (weight.is_raw_parameter and weight.squares is None)]
    if not all(weight.squares is None or weight.squares.isfinite().all() for weight in used):
        hint = "check the model's weights, or load it in bfloat16 or float32"
        raise UsageError(f"calibration_samples: block {index} has activations that are not finite on this text; {hint}")
    return used


def _outlier_ratio(weights: list[_ScoredWeight], threshold: float) -> float:
    """D = 100 * mean of [A > threshold * mean(A)], over all A of a block's weights together; 0 if there is none."""
    parts = [(magnitudes.sum(), magnitudes.numel()) for weight in weights for magnitudes in weight.magnitudes()]
    if (count := sum(size for _, size in parts)) == 0:
        return 0.0
    device = parts[0][0].device
    cutoff = threshold * sum(torch.stack([part.to(device) for part, _ in parts]).tolist()) / count  # one wait for a GPU
    # gt_ writes ones and zeros in place; their sum is several times faster than a boolean tensor's, and exact up to 2^24.
    outliers = [magnitudes.gt_(cutoff).sum().to(device) for weight in weights for magnitudes in weight.magnitudes()]
    return 100 * sum(torch.stack(outliers).tolist()) / count


class _InputRecorder(TorchFunctionMode):
    """Adds up the squares of every weight's input features while the model runs.

    Linear modules report through a hook. A raw parameter is recognised by its memory in the matrix products that its
    block computes: that holds for one expert out of a stack as well, and for whatever tensor FSDP2 puts in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Tensor | None = None  # bool, (batch * length,): the positions that count; None: all
        self._raw_weights: list[_ScoredWeight] = []
        self._last: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def watching(self, layers: nn.ModuleList, blocks: list[list[_ScoredWeight]]) -> Iterator[None]:
        """Records the inputs of the blocks, whose weights are `blocks`, while the context is open."""
        with ExitStack() as hooks, self:
            for block, weights in zip(layers, blocks, strict=True):
                raw_weights = [weight for weight in weights if weight.is_raw_parameter]
                hooks.enter_context(block.register_forward_pre_hook(partial(self._set_raw_weights, raw_weights)))
                hooks.enter_context(block.register_forward_hook(partial(self._set_raw_weights, [])))
                for weight in (weight for weight in weights if not weight.is_raw_parameter):
                    hook = partial(self._on_linear, weight)
                    hooks.enter_context(weight.owner.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._raw_weights and name in ("linear", "matmul", "mm", "bmm"):
            inputs, matrix = [*args, *kwargs.values()][:2]
            self._on_product(inputs, matrix, feature_dim=-1 if name == "linear" else -2)
        return func(*args, **kwargs)

    def _set_raw_weights(self, raw_weights: list[_ScoredWeight], *_: Any) -> None:
        self._raw_weights = raw_weights

    def _on_linear(self, weight: _ScoredWeight, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight.add(self._sum_squares([*args, *kwargs.values()][0]))

    def _on_product(self, inputs: Tensor, matrix: Tensor, feature_dim: int) -> None:
        for weight in self._raw_weights:
            parameter = weight.parameter
            offset = (matrix.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            if not 0 <= offset < parameter.numel():
                continue
            weight.transposed = matrix.stride(feature_dim) != parameter.stride(-1)
            if matrix.dim() == 3:  # all experts at once
                weight.add(torch.stack([self._sum_squares(expert_inputs) for expert_inputs in inputs]))
                continue
            if parameter.dim() == 2 and matrix.numel() < parameter.numel():
                weight.experts = parameter.numel() // matrix.numel()
            stacked = parameter.dim() == 3 or weight.experts is not None
            weight.add(self._sum_squares(inputs), offset // matrix.numel() if stacked else None)

    def _sum_squares(self, inputs: Tensor) -> Tensor:
        """Sums the squares of each input feature over the tokens in float32: (..., in) -> (in,)."""
        if self._last is None or self._last[0] is not inputs:  # q, k and v read the same tensor
            rows = inputs.reshape(-1, inputs.shape[-1])
            rows = rows if self.tokens is None else rows[self.tokens]
            chunks = rows.split(rows_at_a_time(rows.shape[1], rows.device))
            # On CPUs this is up to ten times faster than torch.linalg.vector_norm over the tokens.
            self._last = inputs, torch.stack([chunk.float().square().sum(0) for chunk in chunks]).sum(0)
        return self._last[1]


def _measure_inputs(
    model: nn.Module, layers: nn.ModuleList, blocks: list[list[_ScoredWeight]], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Runs the text through the model, which fills in the squares of the weights."""
    language_model = language_model_of(model)
    device = next(language_model.parameters()).device  # that of the embeddings: blocks may be offloaded
    accepted = inspect.signature(type(language_model).forward).parameters  # of the class: accelerate wraps the instance's
    options = {"use_cache": False, "logits_to_keep": 1}
    # Experts see tokens without their positions, so padding can only be left out beforehand.
    in_lists = any(isinstance(module, nn.ModuleList) for block in layers for module in block.modules())
    has_experts = in_lists or any(weight.parameter.dim() == 3 for weights in blocks for weight in weights)
    recorder, num_texts = _InputRecorder(), 0
    with _calibration_mode(model, blocks), recorder.watching(layers, blocks):
        for batch in batches:
            for inputs, tokens in _inputs_and_mask(batch, device, row_by_row=has_experts):
                recorder.tokens = tokens
                run_causal_lm(model, **{key: value for key, value in (inputs | options).items() if key in accepted})
                num_texts += 1
    if num_texts == 0:
        raise UsageError("calibration_samples: there is no text to score the blocks with; give at least one batch")


def _inputs_and_mask(
    batch: Mapping[str, Tensor], device: torch.device, row_by_row: bool
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Yields a batch on the device with a mask of its tokens (batch * length,), None where there is no padding.

    With `row_by_row`, a batch that has padding is yielded row by row, each without its padding.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        fault = f"calibration needs batches with `input_ids`, not a {type(batch).__name__}"
        raise UsageError(f"sampling.scores: give a file from `{command_line('score')}`; {fault}")
    keys = ("input_ids", "attention_mask", "position_ids")
    inputs = {key: batch[key].to(device) for key in keys if batch.get(key) is not None}
    mask = token_mask(inputs)
    if mask.all():
        inputs.pop("attention_mask", None)
        yield inputs, None
    elif not row_by_row and mask.any():
        yield inputs, mask.flatten().bool()
    else:
        inputs.pop("attention_mask", None)
        for row, is_token in enumerate(mask.bool()):
            if is_token.any():
                yield {key: value[row : row + 1, is_token] for key, value in inputs.items()}, None


@contextmanager
def _calibration_mode(model: nn.Module, blocks: list[list[_ScoredWeight]]) -> Iterator[None]:
    """Sets eval mode and has transformers' experts use plain matrix products; restores both afterwards."""
    raw = (weight.owner for weights in blocks for weight in weights if weight.is_raw_parameter)
    configs: list[Any] = [getattr(owner, "config", None) for owner in raw]
    before = [(config, config._experts_implementation) for config in configs if hasattr(config, "_experts_implementation")]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        with eval_mode(model):
            yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
