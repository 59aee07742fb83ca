"""The projected optimizer. It needs torch alone."""

from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups

__all__ = ["GaLoreAdamW", "galore_param_groups"]
