"""A model to talk to: loaded from wherever it is, and asked turn by turn in its own chat template."""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ows_lightning.checkpoints.find import last_good
from ows_lightning.data.encoding import end_of_turn_id
from ows_lightning.data.rendering import ChatTemplate, with_chat_template
from ows_lightning.errors import UsageError, command_line, first_line, typed_path
from ows_lightning.models.delta import Delta, apply_delta
from ows_lightning.models.pretrained import add_eos_token_id, load_model, load_tokenizer, stop_token_ids
from ows_lightning.models.source import DELTA_FILE, check_model_name
from ows_lightning.report.run import CONFIG_FILE, newest_run, run_containing


class Conversation:
    """The turns so far, and the model that answers them, as its generation config says, in its tokenizer's chat template."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forgets all turns, and sets the system's message."""
        self.system = system
        self.turns: list[dict[str, str]] = []

    def ask(self, text: str, stream: bool = False) -> str:
        """Returns the answer to a message, written to standard output as it comes if asked to, and keeps both as turns."""
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = self._encode(turns)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        model: Any = self.model  # transformers types it as a tensor or a module
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
        answer = str(self.tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True)).strip()
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _encode(self, turns: list[dict[str, str]]) -> torch.Tensor:
        """The turns as token ids (1, L); the oldest are taken out of the list if the model has too few positions."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        template, new = ChatTemplate(self.tokenizer), self.model.generation_config.max_new_tokens
        while True:
            text = template.render([*system, *turns], None, "the conversation", add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
            if ids.size(1) + new <= longest:
                return ids.to(self.model.device)
            if len(turns) == 1:
                most = f"with {new} new ones that is beyond the model's {longest} positions; shorten one of them"
                raise UsageError(f"max_new_tokens: the message has {ids.size(1)} tokens, and {most}")
            del turns[:2]
            print("(the oldest turns are left out: they no longer fit)", file=sys.stderr)


def load_conversation(name: str, args: argparse.Namespace) -> Conversation:
    """Loads a model (a name, a run's folder, a checkpoint or a delta) to talk to, by the flags of `add_generation_flags`."""
    if not args.temperature and (args.top_k or args.top_p < 1):
        raise UsageError("temperature: --top_k and --top_p matter only where answers are drawn; add --temperature 0.7, say")
    asked = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: '{asked}' can't be used ({first_line(error)}); give cpu or cuda") from error
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    with tempfile.TemporaryDirectory() as folder:
        directory = _model_directory(name, Path(folder), args.trust_remote_code)
        tokenizer = with_chat_template(load_tokenizer(directory, args.trust_remote_code))
        model = load_model(directory, dtype, trust_remote_code=args.trust_remote_code).eval().to(device)
    add_eos_token_id(model, end_of_turn_id(tokenizer))
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(model.generation_config))  # None: the tokenizer lacks it
    tokenizer.add_tokens([token for token in stops if token], special_tokens=True)  # a template adds its own again
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(args.seed)
    drawn = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sampling = drawn if args.temperature else dict.fromkeys(drawn)
    model.generation_config.update(do_sample=bool(args.temperature), max_new_tokens=args.max_new_tokens, **sampling)
    return Conversation(model, tokenizer, args.system)


def _model_directory(name: str, folder: Path, trust_remote_code: bool) -> str:
    """The path of a model for `load_model`; a checkpoint or a delta is turned into a model in a folder first."""
    asked = typed_path(name)
    path = newest_run(asked)
    if path != asked:
        print(f"({path} is the newest run there)", file=sys.stderr)
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    if not (path / "config.json").is_file():
        path = last_good(path / "checkpoints") or path  # a run that ended before it wrote its model
    if (path / DELTA_FILE).is_file():
        base = Delta(path).base
        try:
            check_model_name(base)
        except UsageError as error:
            hint = f"make the model with `{command_line('apply-delta BASE', path)}`, and give that"
            raise UsageError(f"model: the base of '{path}', '{base}', is not at hand; {hint}") from error
        apply_delta(base, path, folder / "model", trust_remote_code)
        return str(folder / "model")
    if path.suffix != ".ckpt":
        return name
    if not path.exists():
        raise UsageError(f"model: no such checkpoint '{name}'; give the path of one, or a model's directory")
    if (run := run_containing(path)) is None:
        raise UsageError(f"model: '{name}' lies in no run's folder (with a {CONFIG_FILE}); export it, and give the directory")
    from ows_lightning.cli.lightning_cli import OWSCLI

    command = ["export", "--config", str(run / CONFIG_FILE), "--ckpt_path", str(path), "--output", str(folder / "model")]
    with contextlib.redirect_stdout(io.StringIO()):  # what it says that it wrote is gone when the model is loaded
        OWSCLI([*command, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"])
    return str(folder / "model")
