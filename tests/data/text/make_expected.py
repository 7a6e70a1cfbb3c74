"""What transformers 4.57.6 makes of chat templates, odd token ids and sampling settings.

    python make_expected.py

writes chat.json, decode.json and sampling.json beside itself, for the tests in tests/text.
"""

import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

HERE = Path(__file__).parent
tokenizer = AutoTokenizer.from_pretrained(HERE.parent / "goldens/tiny-a/nf4")


def write(name, cases):
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / name).write_text(f"[\n{lines}\n]\n")


TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "<b>\"a\" & 'b'</b>\t\\ \u007f\u2028 \U0001f642",
        "parameters": {"z": 1.0, "a": [1e-7, 1e16, -0.5, 10**15, None, True], "e": {}, "l": []},
    },
}
USER = {"role": "user", "content": "  hi <there>\n"}
CHAT = {
    "spaces_around_blocks": "a\n  {% if true %}\n    b\n  {% endif %}\nc\n{# note #}\nd {{ 'e' }}\nf\n",
    "trailing_newline": "x\n",
    "strip_and_friends": "{{ messages[0].content.strip() }}|{{ messages[0]['content'].rstrip('\\n') }}|{{ messages[0].content | trim }}"
    "|{{ 'a</think>b'.split('</think>')[-1] }}|{{ 'abc'.startswith('ab') }}|{{ 'Ab'.upper() }}|{{ 'a-b'.replace('-', '+') }}",
    "python_values": "{{ true }} {{ none }} {{ [1, 'x'] }} {{ 1.5 }} {{ messages[0].get('nothing', 'd') }} {{ missing }}|{{ messages[0].name }}",
    "special_tokens": "[{{ bos_token }}][{{ eos_token }}][{{ pad_token }}]",
    "none_is_defined": "{{ tools is none }} {{ tools is defined }} {{ documents is none }} {{ add_generation_prompt }}",
    "loop_controls": "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) -%}\n<{{ m.role }}>\n{%- endmacro %}\n{{ turn(messages[0]) }}",
    "slices": "{{ messages[::-1][0].role }}{{ messages[1:] | length }}{{ 'abcdef'[1:3] }}{{ messages[-1].role }}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v | tojson }};{% endfor %}{% for k, v in messages[0] | items %}{{ k }}{% endfor %}",
    "tests": "{{ messages[0].content is string }} {{ messages is iterable }} {{ messages[0] is mapping }} {{ 3 is number }} {{ 'a' in 'cat' }}",
    "filters": "{{ [3, 1] | sort | join(', ') }} {{ messages | map(attribute='role') | list }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "tojson": "{{ tools[0] | tojson }}",
    "tojson_indent": "{{ tools[0] | tojson(indent=2) }}",
    "tojson_ascii": "{{ tools[0] | tojson(ensure_ascii=true) }}",
    "tojson_separators": "{{ tools[0] | tojson(separators=(',', ':')) }}",
    "tojson_sorted": "{{ tools[0] | tojson(sort_keys=true) }}",
    "concatenation": "{{ 'a' ~ 1 ~ none }}{{ '%s-%s' | format('x', 2) }}{{ 'x' * 3 }}",
    "raise": "{{ raise_exception('roles must alternate') }}",
}


def chat_cases():
    for name, template in CHAT.items():
        tools = [TOOL] if name.startswith("tojson") else None
        case = {"name": name, "template": template, "messages": [USER], "tools": tools}
        try:
            case["rendered"] = tokenizer.apply_chat_template(
                [USER], tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template's own words are what is recorded
            case["refused"] = str(error)
        yield case


def decode_cases():
    rng = random.Random(1)
    for length in range(1, 60):
        ids = [rng.randrange(len(tokenizer)) for _ in range(length)]
        yield {"ids": ids, "text": tokenizer.decode(ids), "skip_special": tokenizer.decode(ids, skip_special_tokens=True)}


def sampling_cases():
    generator = torch.Generator().manual_seed(2)
    rng = random.Random(2)
    for _ in range(60):
        vocab = rng.choice([1, 2, 17, 64, 400])
        # Quarters make ties common; they are exact in f32.
        scale = rng.choice([2, 8, 40])
        logits = torch.randint(-scale, scale + 1, (1, vocab), generator=generator).float() / 4
        seen = [rng.randrange(vocab) for _ in range(rng.choice([0, 3, 9]))]
        settings = {
            "repetition_penalty": rng.choice([1.0, 1.25, 0.5]),
            "temperature": rng.choice([1.0, 0.7, 0.1, 2.5]),
            "top_k": rng.choice([0, 1, 5, 20, 1000]),
            "top_p": rng.choice([1.0, 0.95, 0.8, 0.3, 0.0]),
            "min_p": rng.choice([0.0, 0.05, 0.5, 1.0]),
        }
        scores = logits.clone()
        if settings["repetition_penalty"] != 1.0 and seen:
            scores = RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(torch.tensor([seen]), scores)
        scores = TemperatureLogitsWarper(settings["temperature"])(None, scores)
        if settings["top_k"]:
            scores = TopKLogitsWarper(settings["top_k"])(None, scores)
        before_top_p = scores
        if settings["top_p"] < 1.0:
            scores = TopPLogitsWarper(settings["top_p"])(None, scores)
            # Which of several equal tokens fall is up to torch.sort: leave such cases out.
            kept = scores[0] > -torch.inf
            if set(before_top_p[0][kept].tolist()) & set(before_top_p[0][~kept].tolist()):
                continue
        if settings["min_p"]:
            scores = MinPLogitsWarper(settings["min_p"])(None, scores)
        probabilities = scores.softmax(-1)[0].tolist()
        yield {
            "logits": logits[0].tolist(),
            "seen": seen,
            **settings,
            "probabilities": {str(i): p for i, p in enumerate(probabilities) if p > 0},
        }


write("chat.json", chat_cases())
write("decode.json", decode_cases())
write("sampling.json", sampling_cases())
