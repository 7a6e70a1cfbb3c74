"""What llama.cpp's server tests ask of a server, as far as it applies to another one, by a client of its own.

    llama_cpp_cases.py URL KEYED_URL KEY

The cases were learnt from tools/server/tests/unit of llama.cpp (chat completion, completion, tokenize,
security, responses, anthropic, metrics; as in the source package of llama-cpp-python 0.3.36); the code here
is not theirs. Each check names its cases. What does not apply stands in NOT_APPLICABLE, with the reason;
both together are all cases of those files. Standard library only. URL serves the built-in model with a
context of 2k and lists the origin http://web.example; KEYED_URL takes KEY. Exit 1 if a check fails.
"""

import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

URL, KEYED_URL, KEY = sys.argv[1:4]
CHAT = "/v1/chat/completions"
BOOK = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
TOOL = {
    "name": "list_files",
    "description": "List files",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}
checks = []


class Answer:
    def __init__(self, status, headers, data):
        self.status, self.headers, self.data = status, headers, data

    @property
    def json(self):
        return json.loads(self.data)

    @property
    def error(self):
        return self.json["error"]

    @property
    def events(self):
        """The data of all events; a stream of the chat API must end with [DONE]."""
        lines = self.data.decode().split("\n")
        found = [line[5:].strip() for line in lines if line.startswith("data:")]
        return [json.loads(data) for data in found if data != "[DONE]"]


def ask(method, path, body=None, headers=None, url=URL, timeout=60):
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=timeout)
    headers = dict(headers or {})
    data = None
    if body is not None:
        data = json.dumps(body)
        headers["content-type"] = "application/json"
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def ok(path, **body):
    answer = ask("POST", path, body)
    assert answer.status == 200, (answer.status, answer.data[:300])
    return answer


def refused(path, **body):
    answer = ask("POST", path, body)
    assert answer.status == 400, (body, answer.status, answer.data[:300])
    assert answer.error["message"]
    return answer.error


def case(*names):
    def register(function):
        checks.append((function, names))
        return function

    return register


# test_basic.py, test_tokenize.py


@case("test_server_start_simple", "test_access_public_endpoint")
def health_is_public():
    for url in (URL, KEYED_URL):
        answer = ask("GET", "/health", url=url)
        assert answer.status == 200 and "error" not in answer.json


@case("test_server_models")
def one_model_is_listed():
    assert len(ask("GET", "/v1/models").json["data"]) == 1


@case("test_tokenize_detokenize")
def tokens_give_the_text_again():
    content = "What is the capital of France ?"
    tokens = ok("/tokenize", content=content).json["tokens"]
    assert len(tokens) > 5
    assert ok("/detokenize", tokens=tokens).json["content"].strip() == content


@case("test_tokenize_with_pieces")
def pieces_are_told():
    content = "This is a test string with unicode 媽 and emoji 🤗"
    for token in ok("/tokenize", content=content, with_pieces=True).json["tokens"]:
        assert token["id"] >= 0 and len(token["piece"]) > 0


# test_security.py


@case("test_incorrect_api_key")
def wrong_keys_are_refused():
    for key in (None, "invalid-key"):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = ask("POST", "/v1/completions", {"prompt": "I believe"}, headers, KEYED_URL)
        assert answer.status == 401 and answer.error["type"] == "authentication_error"


@case("test_correct_api_key", "test_correct_api_key_anthropic_header", "test_openai_library_correct_api_key")
def right_keys_are_taken_in_both_headers():
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
        body = {"prompt": "I believe", "max_tokens": 2}
        answer = ask("POST", "/v1/completions", body, headers, KEYED_URL)
        assert answer.status == 200 and "text" in answer.json["choices"][0]


@case("test_cors_options")
def a_listed_origin_may_ask_beforehand():
    asks = {"origin": "http://web.example", "access-control-request-method": "POST"}
    answer = ask("OPTIONS", CHAT, headers=asks)
    assert answer.status in (200, 204)
    assert answer.headers["access-control-allow-origin"] == "http://web.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]


@case("test_cors_origins_localhost_rejects")
def an_unlisted_origin_may_not():
    for origin in ("http://evil.example", "http://localhost.evil.example", "http://notlocalhost"):
        asks = {"origin": origin, "access-control-request-method": "POST"}
        answer = ask("OPTIONS", CHAT, headers=asks)
        assert "access-control-allow-origin" not in answer.headers


@case("test_local_media_file")
def files_are_not_read():
    for url in ("file://mtmd/test-1.jpeg", "file:////etc/passwd", "file://../x.jpeg"):
        part = {"type": "image_url", "image_url": {"url": url}}
        refused(CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])


# test_chat_completion.py


@case("test_chat_completion", "test_chat_completion_with_openai_library")
def a_chat_counts_its_tokens():
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "the best book"}]
    for content in ("Hey", "What is the best book", parts):
        messages = [BOOK[0], {"role": "user", "content": content}]
        body = ok(CHAT, model="x", max_tokens=8, messages=messages, ignore_eos=True).json
        assert "cmpl" in body["id"] and body["system_fingerprint"]
        assert body["usage"]["completion_tokens"] == 8 and body["usage"]["prompt_tokens"] > 4
        choice = body["choices"][0]
        assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"


@case("test_chat_completion_cached_tokens")
def a_prompt_that_begins_alike_is_cached_up_to_there():
    # Longer than theirs, and once more: the state of a delta net cannot be cut, so one is kept where two
    # prompts part, and the third begins there.
    system = {"role": "system", "content": "Test of a cache. " * 40}

    def cached(text):
        usage = ok(CHAT, messages=[system, {"role": "user", "content": text}], max_tokens=4).json["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    total, first = cached("1 2 3 4 5 6")
    assert first < 10
    cached("1 2 3 9 9 9")
    again, known = cached("1 2 3 7 7 7")
    assert again == total and total - 40 < known < total, (known, total)


@case("test_chat_completion_stream", "test_openai_library_correct_api_key")
def a_stream_has_its_role_first_and_its_reason_last():
    events = ok(CHAT, messages=BOOK, max_tokens=12, stream=True, stream_options={"include_usage": True}).events
    assert len({event["id"] for event in events}) == 1
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert choices[-1]["finish_reason"] in ("stop", "length") and "content" not in choices[-1]["delta"]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] <= 12


@case("test_chat_template", "test_apply_chat_template", "test_add_generation_prompt")
def a_template_is_applied_and_shown():
    prompt = ok("/apply-template", messages=BOOK).json["prompt"]
    assert prompt.index("Book") < prompt.index("What is the best book")
    assert prompt.rstrip().endswith("assistant")


@case("test_chat_template_continue_final_message_vllm_compat")
def an_answers_beginning_is_continued():
    begun = BOOK + [{"role": "assistant", "content": "Whill"}]
    body = {"add_generation_prompt": False, "continue_final_message": True}
    assert ok("/apply-template", messages=begun, **body).json["prompt"].endswith("assistant\nWhill")
    closed = ok("/apply-template", messages=begun, add_generation_prompt=False).json["prompt"]
    assert closed.count("assistant") == 1 and not closed.endswith("Whill")


@case("test_chat_template_continue_final_message_mutual_exclusion")
def an_answer_is_not_both_continued_and_begun():
    begun = BOOK + [{"role": "assistant", "content": "Hello"}]
    refused(CHAT, messages=begun, add_generation_prompt=True, continue_final_message=True)


@case("test_completion_with_response_format", "test_completion_with_json_schema")
def answers_have_the_form_that_was_asked_for():
    def content(**body):
        return ok(CHAT, messages=BOOK, max_tokens=40, **body).json["choices"][0]["message"]["content"]

    constant = {"type": "json_schema", "json_schema": {"schema": {"const": "foooooo"}}}
    assert json.loads(content(response_format=constant)) == "foooooo"
    within = {"type": "json_object", "schema": {"const": "42"}}
    assert json.loads(content(response_format=within)) == "42"
    assert json.loads(content(json_schema={"const": "42"})) == "42"
    assert content(response_format={"type": "json_object"}).lstrip().startswith("{")
    for wrong in (
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": 123}},
        {"type": "json_object", "schema": {"type": "hiccup"}},
    ):
        refused(CHAT, messages=BOOK, max_tokens=8, response_format=wrong)


@case("test_completion_with_invalid_grammar")
def a_grammar_is_refused():
    refused(CHAT, messages=BOOK, grammar="root ::= this is (not valid GBNF")


@case("test_invalid_chat_completion_req")
def wrong_conversations_are_refused():
    user = {"role": "user", "content": "test"}
    for messages in (None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}], [user, {}]):
        refused(CHAT, messages=messages)


@case("test_logprobs", "test_logprobs_stream")
def logprobs_are_of_the_text():
    body = ok(CHAT, messages=BOOK, max_tokens=8, logprobs=True, top_logprobs=10, temperature=0).json
    entries = body["choices"][0]["logprobs"]["content"]
    events = ok(CHAT, messages=BOOK, max_tokens=8, logprobs=True, top_logprobs=10, temperature=0, stream=True).events
    streamed = [
        entry
        for event in events
        for choice in event["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    text = body["choices"][0]["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().startswith(text)
    for entry in entries + streamed:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 10
        assert max(best["logprob"] for best in entry["top_logprobs"]) == entry["logprob"], "greedy"
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


@case("test_logit_bias")
def a_bias_keeps_tokens_out():
    words = [" the", " of", " a", " to", " in", "The"]
    ids = {str(i): -100 for word in words for i in ok("/tokenize", content=word).json["tokens"]}
    body = ok("/v1/completions", prompt="What is the best book", max_tokens=48, temperature=0, logit_bias=ids).json
    tokens = ok("/tokenize", content=body["choices"][0]["text"]).json["tokens"]
    ids_said = ok(
        "/v1/completions", prompt="What is", max_tokens=48, temperature=0, logit_bias=ids, return_token_ids=True
    ).json["choices"][0]["token_ids"]
    assert not {str(i) for i in ids_said} & set(ids), tokens


@case("test_context_size_exceeded", "test_context_size_exceeded_stream", "test_nocache_long_input_prompt")
def a_prompt_that_is_too_long_is_refused_before_the_stream():
    long = [{"role": "user", "content": "Hello " * 4000}]
    for stream in (False, True):
        error = refused(CHAT, messages=long, stream=stream)
        assert error["type"] == "exceed_context_size_error"
        assert error["n_prompt_tokens"] > error["n_ctx"] > 0


@case("test_chat_completions_multiple_choices")
def several_choices_are_given():
    for _ in range(2):
        body = ok(CHAT, messages=BOOK, max_tokens=8, n=2, id_slot=0).json
        assert [choice["index"] for choice in body["choices"]] == [0, 1]


# test_completion.py, test_ignore_eos.py


@case("test_completion", "test_completion_with_openai_library", "test_completion_unified")
def a_completion_has_timings():
    body = ok("/v1/completions", prompt="I believe the meaning of life is", max_tokens=8, ignore_eos=True).json
    timings = body["timings"]
    assert timings["predicted_n"] == 8 and timings["prompt_n"] + timings["cache_n"] > 4
    assert body["choices"][0]["finish_reason"] == "length"


@case("test_completion_stream", "test_completion_stream_with_openai_library", "test_completion_stream_vs_non_stream")
def a_streamed_completion_is_the_same_text():
    body = {"prompt": "I believe the meaning of life is", "max_tokens": 24, "temperature": 0}
    whole = ok("/v1/completions", **body).json["choices"][0]["text"]
    events = ok("/v1/completions", stream=True, **body).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole


@case("test_completion_stream_with_openai_library_stops")
def a_stop_string_is_never_sent():
    body = {"prompt": "I believe the meaning of life is", "max_tokens": 24, "temperature": 0}
    whole = ok("/v1/completions", **body).json["choices"][0]["text"]
    stop = whole[5:8]
    events = ok("/v1/completions", stream=True, stop=[stop], **body).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole[: whole.index(stop)]


@case("test_consistent_result_same_seed", "test_different_result_different_seed", "test_consistent_result_different_batch_size", "test_cache_vs_nocache_prompt")
def seeds_decide():
    def text(seed, temperature=1.0):
        body = {"prompt": "I believe the meaning of life is", "max_tokens": 24, "seed": seed}
        return ok("/v1/completions", temperature=temperature, **body).json["choices"][0]["text"]

    assert len({text(42) for _ in range(3)}) == 1
    assert len({text(seed) for seed in range(4)}) == 4
    assert len({text(seed, 0.0) for seed in range(3)}) == 1


@case("test_completion_with_tokens_input")
def a_prompt_may_be_ids():
    prompt = "I believe the meaning of life is"
    ids = ok("/tokenize", content=prompt).json["tokens"]
    texts = []
    for one in (prompt, ids, [ids, ids], [prompt, prompt]):
        body = ok("/v1/completions", prompt=one, max_tokens=8, temperature=0).json
        texts += [choice["text"] for choice in body["choices"]]
    assert len(texts) == 6 and len(set(texts)) == 1


@case("test_json_prompt_mtm_error_when_not_supported")
def media_in_a_prompt_are_refused():
    refused("/v1/completions", prompt={"prompt_string": "x", "multimodal_data": "iVBORw0KGgo="})


@case("test_completion_parallel_slots")
def requests_side_by_side_get_the_answers_of_requests_alone():
    prompts = ["Write a very long book.", "Write another a poem.", "What is LLM?", "The sky is blue."]
    body = {"max_tokens": 24, "temperature": 0}
    alone = [ok("/v1/completions", prompt=prompt, **body).json["choices"][0]["text"] for prompt in prompts]
    for clients in (2, 4, 8):
        found = [None] * clients

        def client(i):
            found[i] = ok("/v1/completions", prompt=prompts[i % 4], **body).json["choices"][0]["text"]

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert found == [alone[i % 4] for i in range(clients)]


@case("test_n_probs", "test_n_probs_stream")
def completions_have_logprobs():
    body = {"prompt": "I believe the meaning of life is", "logprobs": 5, "temperature": 0, "max_tokens": 5}
    logprobs = ok("/v1/completions", **body).json["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == 5
    assert all(logprob <= 0 for logprob in logprobs["token_logprobs"])
    events = ok("/v1/completions", stream=True, **body).events
    streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    assert [token for part in streamed for token in part["tokens"]] == logprobs["tokens"]


@case("test_cancel_request")
def a_request_that_is_left_is_forgotten():
    try:
        ask("POST", "/v1/completions", {"prompt": "I believe", "max_tokens": 2000, "ignore_eos": True}, timeout=0.2)
    except TimeoutError:
        pass
    time.sleep(2)
    assert ask("GET", "/health").json["requests_running"] == 0


@case("test_completion_prompt_cache")
def prompts_go_in_and_out_of_the_cache():
    for i in (0, 3, 1, 0, 4, 2, 0, 1, 3, 4, 0, 2):
        prompt = f" Hello {i}" * (40 + i)
        timings = ok("/v1/completions", prompt=prompt, max_tokens=2, ignore_eos=True).json["timings"]
        total = len(ok("/tokenize", content=prompt).json["tokens"])
        assert timings["prompt_n"] + timings["cache_n"] == total and timings["predicted_n"] == 2


@case("test_metrics_timings_are_finite")
def timings_are_finite():
    for n in (1, 8):
        timings = ok("/v1/completions", prompt=f"I believe {n}", max_tokens=n, ignore_eos=True).json["timings"]
        assert all(isinstance(value, (int, float)) and value >= 0 for value in timings.values()), timings
        assert timings["prompt_ms"] > 0


# test_metrics.py


@case("test_metrics_prometheus_format", "test_metrics_prompt_processed_and_cached", "test_metrics_predicted_total_matches_requests")
def metrics_count_what_was_answered():
    def read():
        text = ask("GET", "/metrics").data.decode()
        values = {}
        for line in text.splitlines():
            if not line.startswith("#") and "{" in line:
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0]] = float(value)
        for name in values:
            assert f"# HELP {name}" in text or name.rsplit("_", 1)[0] in text
        return values

    before = read()
    said = {"prompt_n": 0, "cache_n": 0, "predicted_n": 0}
    for n in (1, 4, 16):
        timings = ok("/v1/completions", prompt="Of metrics " * 60, max_tokens=n, ignore_eos=True).json["timings"]
        said = {key: said[key] + timings[key] for key in said}
    after = read()

    def grew(name):
        return after[name] - before[name]

    assert grew("vllm:generation_tokens_total") == said["predicted_n"] == 21
    assert grew("vllm:prompt_tokens_total") == said["prompt_n"] + said["cache_n"]
    assert grew("vllm:prefix_cache_hits_total") == said["cache_n"] > 0
    assert after["vllm:num_requests_running"] == 0


# test_compat_oai_responses.py


@case("test_responses_with_openai_library", "test_responses_stream_with_openai_library")
def responses_name_their_parts():
    body = {"input": BOOK, "max_output_tokens": 8, "temperature": 0}
    whole = ok("/v1/responses", **body).json
    assert whole["id"].startswith("resp_") and whole["output"][0]["id"].startswith("msg_")
    text, ids = "", set()
    for event in ok("/v1/responses", stream=True, **body).events:
        kind = event["type"]
        if kind == "response.output_text.delta":
            text += event["delta"]
        if "item_id" in event:
            ids.add(event["item_id"])
        if kind == "response.output_item.added":
            ids.add(event["item"]["id"])
        if kind in ("response.completed", "response.incomplete"):
            last = event["response"]
    assert len(ids) == 1 and next(iter(ids)).startswith("msg_")
    assert last["output"][0]["content"][0]["text"] == text == whole["output"][0]["content"][0]["text"]
    assert last["usage"]["output_tokens"] <= 8


# test_compat_anthropic.py


def message(content, **more):
    body = {"model": "test", "max_tokens": 30, "messages": [{"role": "user", "content": content}]}
    return ok("/v1/messages", **(body | more))


@case(
    "test_anthropic_messages_basic", "test_anthropic_messages_with_system", "test_anthropic_messages_multipart_content",
    "test_anthropic_temperature", "test_anthropic_top_p", "test_anthropic_top_k", "test_anthropic_metadata",
    "test_anthropic_thinking", "test_anthropic_vs_openai_different_response_format",
)
def messages_are_answered():
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " the answer?"}]
    for content, more in (
        ("Say hello", {}),
        ("Say hello", {"system": "You are a helpful assistant."}),
        ("Say hello", {"system": [{"type": "text", "text": "You are"}, {"type": "text", "text": " helpful."}]}),
        (parts, {}),
        ("Hello", {"temperature": 0.5, "top_p": 0.9, "top_k": 40}),
        ("Hello", {"metadata": {"user_id": "test_user_123"}}),
        ("Hello", {"thinking": {"type": "enabled", "budget_tokens": 20}}),
    ):
        body = message(content, **more).json
        assert body["type"] == "message" and body["role"] == "assistant"
        assert body["content"][0]["type"] in ("text", "thinking")
        assert body["stop_reason"] in ("end_turn", "max_tokens")
        usage = body["usage"]
        assert all(isinstance(usage[key], int) for key in ("input_tokens", "output_tokens", "cache_read_input_tokens"))
        assert 0 < usage["output_tokens"] <= 30 and "timings" not in body and "choices" not in body


@case("test_anthropic_messages_conversation", "test_anthropic_tool_result", "test_anthropic_tool_result_with_text", "test_anthropic_tool_result_error")
def results_of_tools_are_read():
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"location": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "Sunny, 25°C"}
    for last in (
        [result],
        [{"type": "text", "text": "Here are the results:"}, result],
        [dict(result, is_error=True)],
        [dict(result, content=[{"type": "text", "text": "Sunny"}])],
    ):
        turns = [
            {"role": "user", "content": "What's the weather?"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": last},
        ]
        assert ok("/v1/messages", max_tokens=10, messages=turns).json["content"][0]["type"] == "text"


@case("test_anthropic_vision_format_accepted", "test_anthropic_vision_base64_with_multimodal_model", "test_anthropic_tool_result_with_image")
def pictures_are_refused_and_not_dropped():
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    for content in ([picture], [{"type": "tool_result", "tool_use_id": "t", "content": [picture]}]):
        refused("/v1/messages", max_tokens=10, messages=[{"role": "user", "content": content}])


@case("test_anthropic_messages_streaming", "test_anthropic_streaming_content_block_indices")
def a_stream_of_messages_has_its_events_in_order():
    tool = {"name": "t", "description": "A test tool", "input_schema": TOOL["parameters"]}
    for more in ({}, {"tools": [tool]}):
        events = message("Say hello", stream=True, **more).events
        kinds = [event["type"] for event in events if event["type"] != "ping"]
        assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
        assert events[0]["message"]["content"] == [] and events[0]["message"]["usage"]["input_tokens"] > 0
        starts = [event["index"] for event in events if event["type"] == "content_block_start"]
        stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
        assert starts == stops == list(range(len(starts))) and starts
        last = next(event for event in events if event["type"] == "message_delta")
        assert last["delta"]["stop_reason"] and last["usage"]["output_tokens"] > 0
        assert all("timings" not in event for event in events)


@case("test_anthropic_stop_sequences")
def a_stop_sequence_is_told():
    whole = message("Say hello", temperature=0).json["content"][0]["text"]
    stop = whole[4:7]
    body = message("Say hello", temperature=0, stop_sequences=[stop]).json
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", stop)


@case("test_anthropic_tool_use_basic", "test_anthropic_tool_streaming")
def a_tool_is_called_where_it_must_be():
    tool = {"name": "look", "input_schema": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}}
    for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
        choice["disable_parallel_tool_use"] = True
        body = message("Look", tools=[tool], tool_choice=choice, temperature=0, max_tokens=90).json
        block = next(block for block in body["content"] if block["type"] == "tool_use")
        assert body["stop_reason"] == "tool_use" and block["id"] and isinstance(block["input"]["on"], bool)
        events = message("Look", tools=[tool], tool_choice=choice, temperature=0, max_tokens=90, stream=True).events
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        parts = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
        assert json.loads("".join(parts)) == block["input"]


@case("test_anthropic_count_tokens", "test_anthropic_count_tokens_with_system", "test_anthropic_count_tokens_no_max_tokens", "test_chat_completions_token_count")
def tokens_are_counted():
    hello = [{"role": "user", "content": "Hello world"}]
    body = ok("/v1/messages/count_tokens", messages=hello).json
    more = ok("/v1/messages/count_tokens", messages=hello, system="You are a helpful assistant.").json
    assert list(body) == ["input_tokens"] and 0 < body["input_tokens"] < more["input_tokens"]


@case("test_anthropic_missing_messages", "test_anthropic_empty_messages")
def messages_must_be_there():
    refused("/v1/messages", max_tokens=5)
    refused("/v1/messages", max_tokens=5, messages=[])


NOT_APPLICABLE = {
    "its own endpoints and fields: /completion, /props, /slots, response_fields, __verbose, generation_settings, "
    "timings_per_token, return_progress, llamacpp: metrics (here: /v1/completions, /health, vllm: names)": [
        "test_server_props", "test_server_slots", "test_completion_response_fields", "test_verbose_debug",
        "test_chat_completion_with_timings_per_token", "test_return_progress", "test_metrics_slots_idle_after_completion",
        "test_metrics_timings_on_prompt_progress", "test_responses_stream_with_llama_telemetry", "test_metrics_disabled",
        "test_metrics_generation_rate_excludes_first_token", "test_ignore_eos_populates_logit_bias",
        "test_ignore_eos_false_no_logit_bias", "test_json_prompt_no_mtmd",
    ],
    "its own models, files, page or flags": [
        "test_server_multiple_addresses", "test_load_split_model", "test_no_ui", "test_server_model_aliases_and_tags",
        "test_access_static_assets_without_api_key", "test_cors_proxy_only_forwards_explicit_proxy_headers",
        "test_reasoning", "test_date_inside_prompt", "test_n_probs_post_backend_sampling",
    ],
    "the default of CORS: pages of this machine are refused here too, unless listed": [
        "test_cors_origins_localhost_reflects", "test_cors_origins_defaults_to_localhost_with_tools_enabled",
    ],
    "the model's tokenizer has no beginning-of-text token": ["test_tokenize_with_bos"],
    "GBNF grammars are refused; JSON schemas and regular expressions are enforced": ["test_completion_with_grammar"],
    "probabilities after sampling are not told": ["test_n_probs_post_sampling"],
    "an answer's beginning is continued where that is asked for, not wherever the last message is an answer": [
        "test_chat_template_assistant_prefill",
    ],
    "no embeddings": ["test_metrics_embedding_prompt_is_counted"],
    "the built-in model's template knows no thinking": [
        "test_anthropic_thinking_history_in_count_tokens", "test_anthropic_thinking_history_in_template",
        "test_anthropic_thinking_with_reasoning_model",
    ],
}

failed = []
for function, names in checks:
    try:
        function()
    except Exception as error:
        failed.append(function.__name__)
        line = error.__traceback__.tb_next.tb_lineno
        print(f"FAIL {function.__name__}, line {line} ({', '.join(names)}): {type(error).__name__} {error}")
covered = {name for _, names in checks for name in names}
apart = sum(map(len, NOT_APPLICABLE.values()))
print(f"{len(checks) - len(failed)} of {len(checks)} checks passed, of {len(covered)} of llama.cpp's cases; "
      f"{apart} do not apply")
sys.exit(bool(failed))
