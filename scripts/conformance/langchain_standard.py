"""langchain-tests' standard tests of chat models, by langchain-openai; run by pytest, URL in SERVER."""

import os

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestServed(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "tiny",
            "base_url": os.environ["SERVER"] + "/v1",
            "api_key": "none",
            "max_tokens": 256,
            "temperature": 0,
            "max_retries": 0,
            # langchain-openai asks other servers than OpenAI's for usage only if told to.
            "stream_usage": True,
            # A tiny model repeats itself within strings for ever without it.
            "frequency_penalty": 0.6,
        }

    @property
    def supports_image_inputs(self):
        return False
