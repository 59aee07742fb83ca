"""``chat --model DIR``: a conversation in the terminal, or with lines from a pipe, each a message."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ows_lightning.cli.flags import Parser, add_generation_flags, standard_input
from ows_lightning.errors import UsageError

if TYPE_CHECKING:
    from ows_lightning.cli.conversation import Conversation

_HELP = "/reset forgets the conversation, /system TEXT also sets the system message, /exit ends"


def run(words: list[str]) -> None:
    """Loads the model, and answers each line."""
    parser = Parser("chat", f"Talk to a model. A line is a message; {_HELP}.")
    parser.add_argument("--model", required=True, help="A directory, hub name, .gguf file, delta, run's folder or checkpoint")
    add_generation_flags(parser)
    given = parser.parse_args(words)
    from ows_lightning.cli.conversation import load

    conversation = load(given.model, given)
    lines = standard_input()
    typed = lines.isatty()
    if typed:
        print(_HELP)
    try:
        while True:
            if typed:
                print("> ", end="", flush=True)
            line = lines.readline()
            if not line or line.strip() == "/exit":
                return
            _answer(conversation, line.strip())
    except KeyboardInterrupt:  # as /exit
        print()


def _answer(conversation: Conversation, message: str) -> None:
    command, _, rest = message.partition(" ")
    if command == "/reset":
        conversation.reset(conversation.system)
    elif command == "/system":
        conversation.reset(rest.strip() or None)
    elif command.startswith("/") and command[1:].isalpha():
        print(f"there is no {command}; {_HELP}", file=sys.stderr)
    elif message:
        try:
            conversation.ask(message, stream=True)
        except UsageError as error:  # of this message; the next one may be shorter
            print(f"error: {error}", file=sys.stderr)
