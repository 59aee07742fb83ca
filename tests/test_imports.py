"""What importing the package costs: the optimizer alone needs torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("lightning", "transformers", "datasets", "matplotlib")


def printed(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600).stdout.strip()


@pytest.mark.slow
def test_the_optimizer_needs_torch_alone_and_who_uses_lightning_finds_the_strategies() -> None:
    code = (
        "import sys\nimport torch\nfrom ows_lightning.optim import GaLoreAdamW, galore_param_groups\n"
        "assert 'torch.distributed.tensor' not in sys.modules, 'as long again as half of torch'\n"
        "from ows_lightning import GaLoreAdamW as same\nassert same is GaLoreAdamW\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))\n"
        "net = Net()\n"
        "optimizer = GaLoreAdamW(galore_param_groups(net, rank=2))\n"
        "optimizer.project_in_backward()\n"
        "net.layers[0](torch.ones(1, 8)).sum().backward()\n"
        "optimizer.step()\n"
        "torch.save(optimizer.state_dict(), __import__('io').BytesIO())\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
        "from ows_lightning import LayerwiseSampling\nfrom lightning.pytorch.strategies import StrategyRegistry\n"
        "print('fsdp2' in StrategyRegistry)"
    )
    assert printed(code).splitlines() == ["[]", "True"]


def test_every_public_name_is_there() -> None:
    import ows_lightning

    assert set(ows_lightning.__all__) <= set(dir(ows_lightning))
    assert all(getattr(ows_lightning, name).__name__ == name for name in ows_lightning.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ows_lightning.no_such_name
