"""Find the best scaler for a model at a length, and export the model to other software.

    python examples/tune_and_export.py --out exported
    python examples/tune_and_export.py --target 4x --budget 3600 --out exported --serve vllm

A budget of one or two minutes only skims a few scalers. Give twenty minutes for a result to use.
"""

import argparse

import ropewalk as rw

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--target", default="1.125x", help="tokens, or times the trained length")
parser.add_argument("--text", default="kjv", help="a built-in text, a file or a folder: like what the model will read")
parser.add_argument("--budget", type=float, default=90, help="seconds for measuring")
parser.add_argument("--serve", default="hf", help="hf, vllm, sglang, llama.cpp or ollama")
parser.add_argument("--out", required=True, help="a new folder")
args = parser.parse_args()

model = rw.load(args.model)
tuned = rw.tune(
    model, args.target, text=args.text, budget=args.budget, progress=lambda p: print(f"{p.round}: {p.scaler}")
)
for candidate in tuned.ranking[:5]:
    loss = candidate.loss if candidate.loss is not None else candidate.skimmed_loss
    print(f"{candidate.label:<28} {loss:.3f} nats a token, {'read' if candidate.loss else 'skimmed'}")
servable = tuned.servable
if servable is None:
    raise SystemExit("the budget was too short to measure a scaler that a config can hold; give a longer --budget")
print(f"\nbest: {tuned.winner.label}; best that a config can hold: {servable.label}")
print(rw.export(args.model, args.out, rope=servable.scaler, target=args.serve))
