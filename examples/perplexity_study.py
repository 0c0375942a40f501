"""Loss against context length under several scalers, with a plot.

    python examples/perplexity_study.py --out study
    python examples/perplexity_study.py --ropes none yarn:4 "rerope:0.25x|logn" --lengths 1x 2x 4x --out study

The same last tokens are scored under every context, so differences are paired token by token.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

import ropewalk as rw

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--text", default="shakespeare")
parser.add_argument("--ropes", nargs="+", default=["none", "yarn:2"])
parser.add_argument("--lengths", nargs="+", default=["1k", "1.125x"])
parser.add_argument("--target", type=int, default=512, help="tokens that are scored")
parser.add_argument("--out", type=Path, required=True, help="a folder")
args = parser.parse_args()

model = rw.load(args.model)
rows = rw.evals.perplexity(model, args.text, lengths=args.lengths, ropes=args.ropes, target=args.target)
args.out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(figsize=(6, 4))
for rope in args.ropes:
    curve = [row for row in rows if row.rope == str(rw.parse(rope, model.trained_length))]
    axes.plot([row.context for row in curve], [row.loss for row in curve], marker="o", label=rope)
    for row in curve:
        print(f"{rope:<20} {row.context:>7} tokens  loss {row.loss:.3f}  perplexity {row.perplexity:.2f}")
axes.axvline(model.trained_length, ls=":", color="grey", label="trained length")
axes.set_xscale("log", base=2)
axes.set_xlabel("context, tokens")
axes.set_ylabel("loss, nats a token")
axes.legend()
figure.savefig(args.out / "study.png", dpi=150, bbox_inches="tight")
print(f"drawn: {args.out / 'study.png'}")
