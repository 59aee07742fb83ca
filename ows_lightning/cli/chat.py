"""``chat --model DIR``: a conversation in the terminal, or with what comes through a pipe, a message a line."""

from __future__ import annotations

import sys

from ows_lightning.cli.words import Parser, add_generation_flags

_HELP = "/reset forgets the conversation, /system TEXT also sets the system's message, /exit ends"


def run(words: list[str]) -> None:
    """Loads the model, and answers line after line."""
    parser = Parser("chat", f"Talk to a model. A line is a message; {_HELP}.")
    parser.add_argument("--model", required=True, help="A directory, hub name, .gguf file, delta, run's folder or checkpoint")
    add_generation_flags(parser)
    given = parser.parse_args(words)
    from ows_lightning.cli.conversation import load

    conversation = load(given.model, given)
    typed = sys.stdin.isatty()
    if typed:
        print(_HELP)
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        message = line.strip()
        if not line or message == "/exit":
            return
        command, _, rest = message.partition(" ")
        if command == "/reset":
            conversation.reset(conversation.system)
        elif command == "/system":
            conversation.reset(rest.strip() or None)
        elif command.startswith("/") and command[1:].isalpha():
            print(f"there is no {command}; {_HELP}", file=sys.stderr)
        elif message:
            conversation.ask(message, stream=True)
