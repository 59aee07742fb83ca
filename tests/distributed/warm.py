"""What the server of `launch` does once for all."""

import gc
import importlib
from unittest import mock

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # the rules by which transformers renames weights are a thousand patterns
# It imports bitsandbytes, which looks for GPUs (Lightning lets no fork of a process that has looked start processes), and
# compiles a function that no test calls, for which torch imports inductor.
with (
    mock.patch("torch.cuda._is_compiled", return_value=False),
    mock.patch("torch.compile", lambda function=None, **_: function or (lambda decorated: decorated)),
):
    importlib.import_module("transformers.optimization")
gc.freeze()  # else a collection in a forked process copies every page of what was imported
