"""What the server of `launch` does once for all."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # the rules by which transformers renames weights are a thousand patterns
gc.freeze()  # else a collection in a forked process copies every page of what was imported
