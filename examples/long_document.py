"""A question about a document that is longer than the model was trained for, answered in three ways.

    python examples/long_document.py
    python examples/long_document.py --file report.txt --question "Question: Who signed it?\nAnswer:"

scaled        the whole document is read, under the scaler that `auto` takes for its length
NBCE          windows are read one by one; each token is drawn from the pooled distributions
sink window   the document is read as a stream, and the cache keeps only its last part
"""

import argparse
import time
from pathlib import Path

import ropewalk as rw
from ropewalk.evals import load_text

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--file", type=Path, help="a text; by default the Bible's beginning, with a sentence hidden in it")
parser.add_argument(
    "--question", default="Question: What is the code of the lighthouse?\nAnswer: The code of the lighthouse is"
)
parser.add_argument("--tokens", type=int, default=8600, help="length of the document")
parser.add_argument("--window", type=int, default=1024, help="tokens of a window, and of the stream's cache")
args = parser.parse_args()

model = rw.load(args.model)
text = "\n\n".join(load_text(args.file).documents) if args.file else load_text("kjv").documents[0][: 10 * args.tokens]
text = rw.windows(text, model.tokenizer, tokens=args.tokens)[0]  # as much of it as fits, in whole sentences
if args.file is None:
    half = text.index(". ", len(text) // 2) + 2
    text = f"{text[:half]}The code of the lighthouse is 48213. {text[half:]}"
params = rw.SamplingParams(max_new_tokens=12, temperature=0)
length = len(model.tokenizer(text).input_ids)
print(f"{length} tokens; the model was trained for {model.trained_length}\n")


def scaled():
    model.rope = "auto"
    return model.generate(f"{text}\n\n{args.question}", params).text, str(model.rope_at(length + 100))


def pooled():
    model.rope = None
    parts = rw.windows(text, model.tokenizer, tokens=args.window, overlap=args.window // 8)
    answer = model.generate(args.question, params, contexts=parts)
    source = max(set(answer.sources), key=answer.sources.count)
    return answer.text, f"{len(parts)} windows; most of it from window {source + 1}: ...{parts[source][-60:]!r}"


def streamed():
    model.rope = f"sink-window:{args.window}"
    return model.generate(f"{text}\n\n{args.question}", params).text, str(model.rope)


for name, method in {"scaled": scaled, "NBCE": pooled, "sink window": streamed}.items():
    started = time.perf_counter()
    text_written, how = method()
    print(f"{name:<12} {time.perf_counter() - started:5.1f} s  {text_written!r}\n{'':<21}{how}")
