"""`ropewalk serve`: a model behind OpenAI's HTTP protocol."""

from __future__ import annotations

import socket
from typing import Any

import click

from ..errors import ConfigError
from .help_page import EXAMPLES, command
from .options import chosen_rope, given_max_length, is_given, loads_a_model, refuse_tensor_parallel, rope_option
from .waiting import load_model


@command(
    epilog=EXAMPLES + "  ropewalk serve smollm2-135m --rope auto\n"
    "  ropewalk serve ./my-model --rope rerope:0.5x --port 9000 --dtype bfloat16\n"
    "  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
    '    -d \'{"messages": [{"role": "user", "content": "What is the capital of France?"}]}\''
)
@click.argument("model")
@rope_option(default="auto", note=" A request may name another one in its field `rope`.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is every one.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--name", help="What clients call the model.  [default: MODEL]")
@click.option("--api-key", envvar="ROPEWALK_API_KEY", show_envvar=True, help="Key that clients must send.")
@click.option(
    "--rows", default=8, show_default=True, type=click.IntRange(1), help="Requests answered at a time; others wait."
)
@click.option(
    "--queue", default=64, show_default=True, type=click.IntRange(0), help="Requests that may wait; more get a 429."
)
@click.option(
    "--cache-mb",
    default=1024,
    show_default=True,
    type=click.IntRange(0),
    help="Keys and values kept for prompts that begin like earlier ones.",
)
@click.option(
    "--body-mb", default=8, show_default=True, type=click.IntRange(1), help="Largest request; a larger one gets a 413."
)
@click.option(
    "--chat-tokens",
    default=1024,
    show_default=True,
    type=click.IntRange(1),
    help="Most tokens of a chat's answer where the request names no number.",
)
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Names of special tokens in the prompts of /v1/completions stand for them; in chats they never do.",
)
@loads_a_model
@click.option("--max-length", help="Go past the scaler's reach, up to this length.")
def serve(
    model: str,
    rope: str,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    rows: int,
    queue: int,
    cache_mb: int,
    body_mb: int,
    chat_tokens: int,
    special_tokens: bool,
    loading: dict[str, Any],
    max_length: str | None,
) -> None:
    """Serve MODEL over HTTP, as OpenAI's API does.

    Paths: /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics (Prometheus). Requests are written
    together, and join and leave between two tokens. Fields beyond OpenAI's: rope (a scaler for this request), contexts
    (texts that are read separately), continuation, top_k, min_p, repetition_penalty, prompt_logprobs.

    Ctrl-C stops the server when what runs has finished; a second one stops it at once. Needs the extra ropewalk[serve].
    """
    refuse_tensor_parallel(loading, "a server")
    if api_key == "":
        raise click.UsageError("--api-key is empty; give a key, or leave it out to serve without one")
    try:
        import uvicorn

        from ..server.app import Limits, ModelServer
        from ..server.connection import http_options, is_loopback
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, which the server needs; run: pip install 'ropewalk[serve]'"
        ) from error

    _check_free(host, port)
    longest = given_max_length(model, max_length)
    loaded = load_model(
        model, rope=chosen_rope(model, rope), **loading, max_length=longest, special_tokens=special_tokens
    )
    if not loaded.is_compiled and is_given("cache_mb"):
        raise click.UsageError(
            "transformers' modules run this model, and only caches of the compiled kernels are kept; leave out "
            "--cache-mb"
        )
    limits = Limits(
        rows=rows, queue=queue, cache_bytes=cache_mb << 20, body_bytes=body_mb << 20, chat_tokens=chat_tokens
    )
    server = ModelServer(loaded, name or model, api_key=api_key, local=is_loopback(host), limits=limits)
    click.echo(loaded.describe(), err=True)
    if api_key is None and not is_loopback(host):
        click.echo(f"ropewalk: anyone who reaches {host} can use this server; --api-key KEY asks for a key", err=True)
    uvicorn.run(server.app(), host=host, port=port, log_level="info", **http_options())


def _check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}, port {port} ({reason}); name another --port or --host") from None


@command(
    "transformers-serve",
    context_settings={"ignore_unknown_options": True},
    epilog=EXAMPLES + '  ropewalk export ./my-model mapped --rope "self-extend:8,window=0.5x|logn"\n'
    "  ropewalk transformers-serve mapped --continuous-batching --port 9000",
)
@click.argument("folder")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def transformers_serve(folder: str, options: tuple[str, ...]) -> None:
    """Run the server of transformers with a FOLDER whose config names a scaler.

    `ropewalk export` writes such folders. OPTIONS are those of `transformers serve`, such as --continuous-batching,
    which writes many answers together. Needs the extra transformers[serving].
    """
    from ..engine.exports.transformers_serve import serve

    serve(folder, options)
