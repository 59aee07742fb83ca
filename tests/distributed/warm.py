"""What the server of `launch` does once for all: the rules by which transformers renames weights are a thousand patterns."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
