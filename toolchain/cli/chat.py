"""A terminal chat over a conversation that keeps its KV cache."""

import sys
from typing import TYPE_CHECKING, Any

from ...artifacts.errors import MissingDependencyError, RequestError, ToolchainError
from .console import fail, note, result, write_text

if TYPE_CHECKING:
    from ...runtime.requests.answer import Generation
    from ...runtime.requests.conversation import Conversation

HELP = """/image FILE   show a picture with the next message; several may be given
/video FILE   show a clip with the next message
/reset        forget the conversation
/help         this list
/exit         end; so does the end of input (Ctrl-D)
Ctrl-C ends an answer, and at the prompt the chat."""


def run_chat(conversation: "Conversation", images: list[str], videos: list[str], settings: dict[str, Any]) -> None:
    """Read lines from stdin and answer them until the input ends. `images` and `videos` go with the first message.

    Answers go to stdout, everything else to stderr. A request that is refused is named, and the chat goes on; where
    nobody is at the keyboard it ends with that error instead.
    """
    waiting: dict[str, list[str]] = {"image": list(images), "video": list(videos)}
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() line editing and a history

        note("/image FILE shows a picture, /help lists the rest, Ctrl-D ends.")
    while (line := _read(interactive)) is not None:
        command, _, rest = line.partition(" ")
        if command in ("/image", "/video") and rest.strip():
            waiting[command[1:]].append(rest.strip())
        elif command == "/reset":
            conversation.reset()
            waiting = {"image": [], "video": []}
        elif command == "/exit":
            return
        elif command.startswith("/") and command != "/help":
            _refuse(RequestError(f"{command}: unknown or incomplete; /help lists what there is"), interactive)
        elif command == "/help":
            for each in HELP.splitlines():
                note(each)
        elif line:
            try:
                _answer(conversation, line, waiting, settings)
            except (RequestError, MissingDependencyError) as error:
                _refuse(error, interactive)
            waiting = {"image": [], "video": []}


def _read(interactive: bool) -> str | None:
    """The next line without its end; None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        if sys.stdout.isatty():
            return input("> ").strip()
        # input() would write its prompt among the answers
        sys.stderr.write("> ")
        sys.stderr.flush()
        return input().strip()
    except EOFError:
        note("")
        return None


def _refuse(error: ToolchainError, interactive: bool) -> None:
    if not interactive:
        raise error
    fail(str(error))


def _answer(conversation: "Conversation", text: str, waiting: dict[str, list[str]], settings: dict[str, Any]) -> None:
    try:
        answer = conversation.send(
            text, waiting["image"], waiting["video"], on_token=lambda token: write_text(token.text), **settings
        )
    except KeyboardInterrupt:
        result("")
        note("interrupted; the conversation goes on from here")
        return
    result("")
    note(_speed(answer))


def _speed(answer: "Generation") -> str:
    timings = answer.timings_ms
    rate = f", {1e3 / timings['per_token']:.1f} tokens/s" if timings.get("per_token") else ""
    return (
        f"[{len(answer.token_ids)} tokens{rate}; first after {timings['first_token']:.0f} ms; "
        f"{answer.cached_tokens} of {len(answer.prompt_token_ids)} prompt tokens were in the cache]"
    )
