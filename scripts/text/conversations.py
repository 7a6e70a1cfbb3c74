"""What templates are given: conversations of every shape that published templates tell apart."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place, \"now\" & later",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Town, as in Zürich"},
                "days": {"type": "integer", "enum": [1, 3, 7], "default": 1},
                "limits": {"type": "array", "items": {"type": "number"}, "maximum": 1e-05},
                "either": {"type": ["string", "null"]},
            },
            "required": ["place"],
        },
        "return": {"type": "string"},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {
    "type": "object", "properties": {}}}}


def call(arguments, name="get_weather", id="call_12345"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


ARGUMENTS = {"place": "Zürich <\"x\">", "days": 3, "limits": [1.0, 2.5e-07, 1e21], "either": None, "on": True}

SYSTEM = {"role": "system", "content": "You are brief.\n"}
USER = {"role": "user", "content": "  What is 2 + 2? 'Now' & \"then\"\n"}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}],
    "answered": [USER, {"role": "assistant", "content": " It is 4.\n\n"}],
    "thinking": [USER, {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n4"},
                 {"role": "user", "content": "And 3 + 3?"},
                 {"role": "assistant", "reasoning_content": "Add again.", "content": "6"}],
    "calls": [SYSTEM, USER,
              {"role": "assistant", "content": "", "tool_calls": [call(ARGUMENTS), call({}, "clock", "call_67890")]},
              {"role": "tool", "name": "get_weather", "tool_call_id": "call_12345", "content": "{\"sky\": \"grey\"}"},
              {"role": "tool", "name": "clock", "tool_call_id": "call_67890", "content": "noon"},
              {"role": "assistant", "content": "Grey at noon."}, {"role": "user", "content": "Thanks"}],
    "call without content": [USER, {"role": "assistant", "content": None, "tool_calls": [call(ARGUMENTS)]},
                             {"role": "tool", "tool_call_id": "call_12345", "content": "grey"}],
    "call with text": [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [call("{\"place\": \"Bern\"}")]},
                       {"role": "tool", "tool_call_id": "call_12345", "content": "sun"}],
    "parts": [{"role": "system", "content": [{"type": "text", "text": "Brief."}]},
              {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " and two"}]}],
    "image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "developer": [{"role": "developer", "content": "Be kind."}, USER],
    "two systems": [SYSTEM, {"role": "system", "content": "And polite."}, USER],
    "assistant first": [{"role": "assistant", "content": "Hello"}, USER],
    "two users": [USER, {"role": "user", "content": "Well?"}],
    "empty": [],
    "names": [{"role": "user", "name": "Ann", "content": "Grüße 👍\u2028x"}],
}
# Beside the messages.
OPTIONS = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"add_generation_prompt": True, "tools": [WEATHER, CLOCK]},
    "no thinking": {"add_generation_prompt": True, "variables": {"enable_thinking": False, "reasoning_effort": "high"}},
    "thinking": {"add_generation_prompt": True, "tools": [CLOCK],
                 "variables": {"enable_thinking": True, "thinking": True, "preserve_thinking": True, "date_string": "1 Jan 2026"}},
    "documents": {"documents": [{"title": "One", "text": "First text"}, {"title": "Two", "text": "Second"}]},
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def requests():
    """`(name, request)` of every conversation with every set of options that can matter to it."""
    for conversation, messages in CONVERSATIONS.items():
        for option, more in OPTIONS.items():
            if option in ("documents", "no thinking") and conversation not in ("user", "turns", "thinking", "calls"):
                continue
            yield f"{conversation}, {option}", {"messages": messages, "config": SPECIAL, **more}


# What tokenizers are given.
TEXTS = [
    "", " ", "  \n\n \t x\r\n", "Hello, world! It's 12345 o'clock.", "def f(x):\n    return x ** 2  # square\n",
    "Grüße aus Zürich, naïve café — “quotes”… €5", "日本語のテキスト、漢字とかな。", "한국어 문장입니다.", "Привет, мир! Ёлка",
    "مرحبا بالعالم", "हिन्दी पाठ", "ไทยไม่มีช่องว่าง", "👍🏽👨‍👩‍👧‍👦🇨🇭", "e\u0301 vs \u00e9, \u212b \ufb01 \u1e9b\u0323", "a\u200bb\u00a0c\u2028d\ufeffe",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|><think>x</think><tool_call>{}</tool_call>", "<s>[INST] x [/INST]</s>",
    "<｜begin▁of▁sentence｜>x<｜Assistant｜>", "<|start_header_id|>user<|end_header_id|>\n\n", " <|im_end|> <|endoftext|> ",
    "\x00\x01\x1f\x7f\x85", "\ud7ff\ue000\uffff\U0010ffff", "x" * 300, " " * 100 + "y", "\n" * 50, "1234567890" * 20,
    "I'LL we'Ve DON'T it'S", "https://example.org/a?b=c&d=%20#e", "\\n \\u00e9 \"\"\" ''' ```", "ǅ ß ẞ İ ı ſ", "１２３ ½ ² ①",
]
