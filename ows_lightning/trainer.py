"""OWSTrainer: a Trainer whose runs resume exactly and stop safely, and whose checkpoints are whole."""

from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from ows_lightning.callbacks.resume import Resume
from ows_lightning.callbacks.save_on_signal import SaveOnSignal
from ows_lightning.callbacks.stop_on_nan import StopOnNaN
from ows_lightning.callbacks.throughput import Throughput
from ows_lightning.checkpoints.io import AtomicCheckpointIO


class OWSTrainer(Trainer):
    """Lightning's Trainer with what makes a run safe; a plain ``Trainer`` trains the same way, but lacks all of this.

    Its checkpoints are written whole or not at all (``AtomicCheckpointIO``). It adds these callbacks, unless you give one of
    the kind: ``SaveOnSignal`` saves when the process is told to end, ``Resume`` makes a resumed run exact (but for what a
    module other than CausalLMModule draws from torch's generator), ``StopOnNaN`` ends a run whose gradients stay NaN or Inf,
    and ``Throughput`` logs tokens, time and memory. The arguments are Lightning's.
    """

    def __init__(self, *args: Any, callbacks: list[Callback] | Callback | None = None, **kwargs: Any) -> None:
        given: list[Any] = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or ())
        first = [kind() for kind in (Resume, Throughput, StopOnNaN) if not any(isinstance(c, kind) for c in given)]
        last = [] if any(isinstance(c, SaveOnSignal) for c in given) else [SaveOnSignal()]  # it saves what all others did
        for callback in given:
            validates = isinstance(callback, EarlyStopping) and callback.monitor.startswith("val_")
            if validates and callback._check_on_train_epoch_end is None:
                callback._check_on_train_epoch_end = False  # an epoch may be cut before its validation
        super().__init__(*args, callbacks=[*first, *given, *last], **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # unless the user gave a plugin
            self.strategy.checkpoint_io = AtomicCheckpointIO()
