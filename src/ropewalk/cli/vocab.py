"""The command `ropewalk vocab`."""

from __future__ import annotations

import click

from .help_page import EXAMPLES, command
from .options import json_option, text_option


@command(
    epilog=EXAMPLES + "  ropewalk vocab smollm2-135m\n"
    "  ropewalk vocab ./my-model --text book.txt --cuts 5000\n"
    "  ropewalk vocab tokenizer.json --text stdlib --json"
)
@click.argument("model")
@text_option("pydoc")
@click.option("--cuts", default=1000, show_default=True, type=click.IntRange(min=1), help="Cuts of every kind.")
@click.option("--seed", default=0, show_default=True, help="Seed of the places of the cuts.")
@json_option("settings, and the numbers of the tables")
def vocab(model: str, text: str, cuts: int, seed: int, as_json: bool) -> None:
    """Describe MODEL's tokenizer, and how often a prompt ends inside one of its tokens.

    MODEL is a built-in name, a folder, a hub id, a tokenizer.json, a SentencePiece .model or a tekken .json; no
    weights are read. The text is cut at random places, and the tokens of what comes before are compared with those
    of the text left whole.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from ..engine.checkpoints.source import load_vocabulary
    from ..evals.data import load_text
    from ..tokenizer_tools.cuts import KINDS
    from ..tokenizer_tools.report import report

    vocabulary, document = load_vocabulary(model), load_text(text)
    found = report(vocabulary, "\n\n".join(document.documents), cuts=cuts, seed=seed)
    if as_json:
        settings = {"model": model, "text": text, "text_sha256": document.sha256, "seed": seed}
        click.echo(json.dumps(settings | asdict(found), default=whole, ensure_ascii=False))
        return
    console = Console(markup=False, emoji=False, highlight=False)
    about = Table("tokenizer", model)
    about.add_row("kind", found.kind)
    about.add_row("tokens", f"{found.size}, of them {found.special} special, added or unused")
    about.add_row("longest", "\n".join(f"{len(token)} bytes  {escaped(token)}" for token in found.longest))
    about.add_row(f"bytes a token on {text}", f"{found.bytes_per_token:.2f}")
    risks = Table("prompts cut", *(risk.kind for risk in found.risks))
    for label, values in {
        "cuts": [str(r.cuts) for r in found.risks],
        "inside a token": [f"{r.inside:.1%}" for r in found.risks],
        "tokens not the uncut text's": [f"{r.changed:.1%}" for r in found.risks],
        "  tokens to back off, mean": [f"{r.depth_mean:.2f}" for r in found.risks],
        "  95% up to, most": [f"{r.depth_p95:.0f}, {r.depth_max}" for r in found.risks],
        "one token back is not enough": [f"{r.deeper:.1%}" for r in found.risks],
        "nodes of covers: mean, most": [f"{r.nodes_mean:.2f}, {r.nodes_max}" for r in found.risks],
        "time to find it": [f"{1e3 * r.seconds:.2f} ms" for r in found.risks],
    }.items():
        risks.add_row(label, *values)
    examples = Table("the prompt ends in", "inside the token")
    for example in found.examples:
        examples.add_row(escaped(example.prompt_end.encode()), escaped(example.token))
    for table in (about, risks, *([examples] if found.examples else [])):
        console.print(table)
    if missing := [kind for kind in KINDS if kind not in [risk.kind for risk in found.risks]]:
        console.print(f"{text} has no such place to cut: {', '.join(missing)}")
    if not found.examples:
        console.print("No cut is inside a token, so there are no examples.")


def whole(token: bytes) -> str:
    """A token as text, with bytes that are no character as \\xe4."""
    return token.decode(errors="backslashreplace")


def escaped(data: bytes) -> str:
    """Bytes as text in quotes; what cannot be shown is escaped, and a long middle left out."""
    shown = repr(whole(data))
    return shown if len(shown) <= 36 else f"{shown[:20]} ... {shown[-10:]}"
