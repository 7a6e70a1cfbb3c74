// openai npm and the AI SDK against a server: `node openai_npm.mjs URL`, in a folder where they are installed.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const url = process.argv[2];
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a river?" }];
const base = { model: "tiny", messages, temperature: 0, max_tokens: 12 };

assert.equal((await client.models.list()).data[0].id, "tiny");
const whole = await client.chat.completions.create(base);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...base, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

const tool = {
  type: "function",
  function: {
    name: "weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: ["Oslo", "Rome"] } },
      required: ["city"],
    },
  },
};
const called = await client.chat.completions.create({
  ...base, max_tokens: 128, tools: [tool], tool_choice: "required",
});
assert.ok(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city);
assert.ok((await client.completions.create({ model: "tiny", prompt: "one", max_tokens: 3 })).choices[0].finish_reason);
const response = await client.responses.create({ model: "tiny", input: "Hello", max_output_tokens: 8 });
assert.ok(["completed", "incomplete"].includes(response.status));
await assert.rejects(client.chat.completions.create({ ...base, n: 1e9 }), { status: 400, param: "n" });

const provider = createOpenAICompatible({ name: "local", baseURL: url + "/v1" });
const model = provider("tiny");
assert.ok((await generateText({ model, prompt: "Hello", maxOutputTokens: 8 })).usage.outputTokens <= 8);
const streamed = streamText({ model, prompt: "Hello", maxOutputTokens: 8 });
for await (const _ of streamed.textStream);
assert.ok(["stop", "length"].includes(await streamed.finishReason));
console.log("openai npm, ai: all");
