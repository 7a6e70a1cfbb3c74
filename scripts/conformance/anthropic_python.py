"""anthropic-python against a server: `anthropic_python.py URL`. Needs the PyPI package `anthropic`."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
USER = [{"role": "user", "content": "What is a river?"}]
TOOL = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

message = client.messages.create(model="tiny", max_tokens=16, messages=USER, system="Be brief.")
assert message.role == "assistant" and message.usage.output_tokens <= 16
assert message.stop_reason in ("end_turn", "max_tokens")

count = client.messages.count_tokens(model="tiny", messages=USER, system="Be brief.")
used = message.usage.input_tokens + message.usage.cache_read_input_tokens
assert count.input_tokens == used, (count, used)

with client.messages.stream(
    model="tiny", max_tokens=128, messages=USER, tools=[TOOL], tool_choice={"type": "any"}
) as stream:
    for _ in stream:
        pass
    final = stream.get_final_message()
call = final.content[0]
assert call.type == "tool_use" and call.input["city"] in ("Oslo", "Rome"), final
assert final.stop_reason == "tool_use"

try:
    client.messages.create(model="tiny", max_tokens=0, messages=USER)
except anthropic.BadRequestError as error:
    assert "max_tokens" in str(error)
else:
    raise AssertionError("max_tokens 0 was taken")
print(f"anthropic {anthropic.__version__}: all")
