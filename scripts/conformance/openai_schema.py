"""Replies against OpenAI's own description of its API: `openai_schema.py URL openapi.json`.

The description is openai/openai-openapi's openapi.json, fetched when this runs and never part of this
repository. Needs the PyPI package `jsonschema`. The server serves the built-in model. Exit 1 if a reply is
not as the description says.
"""

import json
import sys
import urllib.error
import urllib.request

from jsonschema import Draft202012Validator

URL, DESCRIPTION = sys.argv[1:3]


def with_nulls(schema):
    """OpenAPI 3.0's `nullable`, which the description still uses, in the words of JSON Schema."""
    if isinstance(schema, list):
        return [with_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: with_nulls(value) for key, value in schema.items()}
    if schema.get("nullable") is True:
        return {"anyOf": [plain, {"type": "null"}]}
    return plain


SPEC = with_nulls(json.load(open(DESCRIPTION)))
USER = [{"role": "user", "content": "What is a river?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}
failed = []
checked = 0


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def events(text):
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check(schema, value, what):
    """Each value against the schema of that name."""
    global checked
    checked += 1
    whole = {"$ref": f"#/components/schemas/{schema}", "components": SPEC["components"]}
    errors = list(Draft202012Validator(whole).iter_errors(value))
    if errors:
        first = min(errors, key=lambda error: len(error.path))
        where = "/".join(map(str, first.path))
        failed.append(f"{what}: {schema} at `{where}`: {first.message[:300]}")


def chats():
    for name, more in {
        "plain": {},
        "logprobs": {"logprobs": True, "top_logprobs": 3},
        "two choices": {"n": 2},
        "a tool": {"tools": [TOOL], "tool_choice": "required"},
        "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}},
        "too long": {"max_tokens": 1},
    }.items():
        body = {"model": "tiny", "messages": USER, "max_tokens": 24} | more
        status, text = ask("/v1/chat/completions", body)
        check("CreateChatCompletionResponse", json.loads(text), f"chat, {name}, {status}")
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        status, text = ask("/v1/chat/completions", body | usage)
        for event in events(text):
            check("CreateChatCompletionStreamResponse", event, f"streamed chat, {name}, {status}")


def completions():
    for more in ({}, {"logprobs": 3}, {"n": 2}, {"echo": True}):
        body = {"model": "tiny", "prompt": "A river", "max_tokens": 8} | more
        status, text = ask("/v1/completions", body)
        check("CreateCompletionResponse", json.loads(text), f"completion, {more}, {status}")


def responses():
    tool = {"type": "function", "strict": True} | TOOL["function"]
    for name, more in {
        "plain": {},
        "instructions": {"instructions": "Be short.", "metadata": {"a": "b"}},
        "a tool": {"tools": [tool], "tool_choice": "required"},
        "cut off": {"max_output_tokens": 2},
    }.items():
        body = {"model": "tiny", "input": "What is a river?", "max_output_tokens": 24} | more
        status, text = ask("/v1/responses", body)
        check("Response", json.loads(text), f"response, {name}, {status}")
        status, text = ask("/v1/responses", body | {"stream": True})
        for event in events(text):
            check("ResponseStreamEvent", event, f"streamed response, {name}, {event['type']}")


def errors():
    for path, body in (
        ("/v1/chat/completions", {"messages": "x"}),
        ("/v1/chat/completions", {"messages": USER, "temperature": "hot"}),
        ("/v1/completions", {"prompt": "x" * 1_000_000}),
        ("/v1/responses", {}),
        ("/v1/nothing", {}),
    ):
        status, text = ask(path, body)
        assert status >= 400
        check("ErrorResponse", json.loads(text), f"error of {path}, {status}")


check("ListModelsResponse", json.loads(ask("/v1/models")[1]), "models")
check("Model", json.loads(ask("/v1/models/tiny")[1]), "model")
chats()
completions()
responses()
errors()
print(f"{checked - len(failed)} of {checked} replies are valid against {SPEC['info']['title']} {SPEC['info']['version']}")
for failure in failed[:20]:
    print("FAIL", failure)
sys.exit(bool(failed))
