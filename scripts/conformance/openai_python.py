"""openai-python against a server: `openai_python.py URL`, exit 1 if anything is not as its types say.

Needs the PyPI package `openai`; talks to loopback only. The server serves the built-in model.
"""

import json
import sys

import openai
from openai import OpenAI
from pydantic import BaseModel, Field

URL = sys.argv[1]
client = OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0, timeout=60)
MODEL = "tiny"
USER = [{"role": "user", "content": 'What is the meaning of the noun "river"?'}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
checks = []


def check(function):
    checks.append(function)
    return function


@check
def models_are_listed():
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def a_chat_answers_with_usage():
    answer = client.chat.completions.create(model=MODEL, messages=USER, max_completion_tokens=16)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens <= 16
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


@check
def a_stream_is_the_whole_answer():
    kwargs = dict(model=MODEL, messages=USER, max_tokens=16, temperature=0)
    whole = client.chat.completions.create(**kwargs).choices[0].message.content
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **kwargs
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole, (text, whole)
    assert chunks[-1].usage.total_tokens > 0 and not chunks[-1].choices


@check
def logprobs_seeds_and_choices():
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=4, n=2, seed=3, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content)


@check
def a_required_call_is_parsed():
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[TOOL], tool_choice="required", max_tokens=128
    )
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert answer.choices[0].finish_reason == "tool_calls"


@check
def a_streamed_call_is_accumulated():
    with client.chat.completions.stream(
        model=MODEL, messages=USER, tools=[TOOL], tool_choice="required", max_tokens=128
    ) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


@check
def a_typed_answer_is_parsed():
    class Animal(BaseModel):
        # Bounded: a tiny model would write digits for ever.
        legs: int = Field(ge=0, le=100)
        wings: bool

    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, response_format=Animal, max_tokens=128
    )
    assert isinstance(answer.choices[0].message.parsed, Animal)


@check
def completions_of_text_and_of_ids():
    answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=4, logprobs=2, echo=False)
    assert len(answer.choices[0].logprobs.tokens) <= 4
    answer = client.completions.create(model=MODEL, prompt=[[100, 101], [102]], max_tokens=2, n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    stream = client.completions.create(model=MODEL, prompt="one", max_tokens=3, stream=True)
    assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")


@check
def responses_whole_and_streamed():
    answer = client.responses.create(model=MODEL, input="Hello", max_output_tokens=12, store=False)
    assert answer.status in ("completed", "incomplete")
    assert answer.usage.output_tokens <= 12
    tool = {"type": "function", **TOOL["function"], "strict": True}
    with client.responses.stream(
        model=MODEL, input=USER, tools=[tool], tool_choice="required", max_output_tokens=128
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    call = final.output[0]
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Oslo", "Rome")


@check
def a_typed_response_is_parsed():
    class Animal(BaseModel):
        legs: int = Field(ge=0, le=100)

    answer = client.responses.parse(
        model=MODEL, input="An animal?", text_format=Animal, max_output_tokens=64
    )
    assert isinstance(answer.output_parsed, Animal)


@check
def errors_are_typed():
    try:
        client.chat.completions.create(model=MODEL, messages=USER, n=10**9)
    except openai.BadRequestError as error:
        assert error.param == "n" and error.type == "invalid_request_error"
    else:
        raise AssertionError("n = 10^9 was taken")
    try:
        client.completions.create(model=MODEL, prompt="word " * 20000)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"
    else:
        raise AssertionError("a prompt beyond the context was taken")
    try:
        client.models.retrieve("nothing")
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a model that is not here was found")


failed = 0
for function in checks:
    try:
        function()
        print(f"ok    {function.__name__}")
    except Exception as error:  # noqa: BLE001: every failure is told, then the next check runs
        failed += 1
        print(f"FAIL  {function.__name__}: {type(error).__name__}: {error}")
print(f"openai {openai.__version__}: {len(checks) - failed} of {len(checks)}")
sys.exit(failed > 0)
