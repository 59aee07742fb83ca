"""The whole method in a plain PyTorch loop: scores, draws, freezing, projected optimizer, clipping, accumulation.

Run it with ``python examples/plain_loop.py --model my-model``.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

from ows_lightning import GaLoreAdamW, decoder_layers, galore_param_groups, layer_outlier_ratios, sampling_probabilities
from ows_lightning.models.decoder import non_block_parameters
from ows_lightning.sampling.activation import activate_blocks
from ows_lightning.sampling.draws import draw_blocks


def main() -> None:
    """Trains six steps of two micro-batches, with new blocks every second step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=13.0)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model).train()
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=args.rank), lr=1e-3)  # before anything is frozen
    optimizer.project_in_backward(model=model)  # full gradients exist only where a subspace is renewed

    layers = decoder_layers(model)
    others = [(p, part == "norm") for part, ps in non_block_parameters(model).items() for p in ps]  # train the norm alone
    text = [{"input_ids": torch.randint(3, 100, (4, 32))} for _ in range(2)]
    probabilities = sampling_probabilities(layer_outlier_ratios(model, text, threshold=args.threshold))
    generator = torch.Generator().manual_seed(0)

    for step in range(6):
        if step % 2 == 0:
            blocks = draw_blocks(probabilities, 2, generator)
            activate_blocks(layers, blocks, others, [optimizer], resting_seed=step)
        optimizer.zero_grad()
        total = 0.0
        for micro_batch in range(2):
            optimizer.accumulating = micro_batch == 0  # a subspace comes from the whole step's gradient
            ids = torch.randint(3, 100, (2, 16))
            loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
            total += loss.item()
        gradients = optimizer.gradients()  # clip these, which the step consumes; p.grad is empty for projected matrices
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_((1.0 / norm).clamp(max=1.0))
        optimizer.step()
        print(f"step {step}: loss {total:.3f}, gradient norm {float(norm):.3f}, blocks {blocks}")


if __name__ == "__main__":
    main()
