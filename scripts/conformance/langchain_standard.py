"""langchain-tests' standard tests of chat models, by langchain-openai; run by pytest, URL in SERVER.

Against the built-in model (MODEL=tiny) and against one made to answer (MODEL=script, langchain.json). Six of
its 50 tests send pictures, sound or PDF files or want recorded traffic, and are skipped:

    test_image_inputs, test_image_tool_message, test_pdf_inputs, test_pdf_tool_message, test_audio_inputs:
        the models served here read text
    test_stream_time: wants recorded traffic (VCR)

What the built-in model is too small for is expected to fail, with the reason below; the scripted model shows
that the server is not why.
"""

import os

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

TINY_CANNOT = {
    "test_tool_calling": "must copy the argument 3 out of a question",
    "test_agent_loop": "must decide by itself to call a tool",
    "test_unicode_tool_call_integration": "must copy a Chinese name into an argument",
    "test_json_mode": "must name two keys of an object by itself",
}


def reason(name):
    test = name.removesuffix("_async")
    return TINY_CANNOT.get(test)


class TestServed(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def expect_failures_of_a_tiny_model(self, request):
        why = reason(request.node.originalname)
        if why and os.environ.get("MODEL", "tiny") == "tiny":
            request.node.add_marker(pytest.mark.xfail(reason=f"30M parameters: {why}", strict=False))

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "tiny",
            "base_url": os.environ["SERVER"] + "/v1",
            "api_key": "none",
            "max_tokens": 2048,
            "temperature": 0,
            "max_retries": 0,
            # langchain-openai asks other servers than OpenAI's for usage only if told to.
            "stream_usage": True,
            # A tiny model repeats itself within strings for ever without it.
            "frequency_penalty": 1.5,
        }

    @property
    def model_override_value(self):
        return "another-name"

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supports_image_inputs(self):
        return False
