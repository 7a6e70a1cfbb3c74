"""Many clients at once, some of which leave, stall or send nonsense: `soak.py URL [SECONDS] [CLIENTS]`.

Standard library only. The server serves the built-in model with a queue that holds all clients
(`moectl serve --max-queue 512`). Exit 1 if an answer differs from the serial one, an answer is lost, a
5xx comes, gauges don't return to 0, or resident memory grows.
"""

import asyncio
import collections
import json
import random
import sys
import time
import urllib.request
from urllib.parse import urlsplit

URL = sys.argv[1]
SECONDS = float(sys.argv[2]) if len(sys.argv) > 2 else 60
CLIENTS = int(sys.argv[3]) if len(sys.argv) > 3 else 200
HOST, PORT = urlsplit(URL).hostname, urlsplit(URL).port
PROMPTS = [f"The number {n} is" for n in range(20)]
counts = collections.Counter()
problems = []


def body(prompt, stream):
    return {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": stream}


def get(path):
    with urllib.request.urlopen(URL + path, timeout=30) as answer:
        return json.load(answer)


def serial(prompt):
    data = json.dumps(body(prompt, False)).encode()
    request = urllib.request.Request(URL + "/v1/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]


async def send(payload):
    reader, writer = await asyncio.open_connection(HOST, PORT)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


def dechunk(data):
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        out += data[:n]
        data = data[n + 2 :]
    return out


async def ask(expected, rng):
    prompt = rng.choice(PROMPTS)
    stream = rng.random() < 0.5
    reader, writer = await send(json.dumps(body(prompt, stream)).encode())
    answer = await reader.read()
    writer.close()
    head, _, data = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    counts[status] += 1
    if status == 429:
        await asyncio.sleep(0.2)
        return
    if status != 200:
        problems.append(f"{status}: {data[:200]}")
        return
    if not stream:
        text = json.loads(data)["choices"][0]["text"]
    else:
        events = [e[6:] for e in dechunk(data).decode().split("\n\n") if e.startswith("data: ")]
        if events[-1] != "[DONE]":
            problems.append("a stream without its end")
        text = "".join(c["text"] for e in events[:-1] for c in json.loads(e)["choices"])
    if text != expected[prompt]:
        problems.append(f"{prompt!r}: {text!r}, expected {expected[prompt]!r}")


async def leave(rng):
    reader, writer = await send(json.dumps(body(rng.choice(PROMPTS), rng.random() < 0.5)).encode())
    await asyncio.sleep(rng.random() * 0.5)
    writer.transport.abort()
    counts["left"] += 1


async def stall(rng):
    reader, writer = await send(json.dumps(body(rng.choice(PROMPTS), True)).encode())
    await asyncio.sleep(3)
    writer.close()
    counts["stalled"] += 1


async def nonsense(rng):
    payload = rng.choice([b"{", b"[" * 5000, b'{"prompt": "x", "n": 1000000}', bytes(rng.randbytes(200))])
    reader, writer = await send(payload)
    answer = await reader.read()
    writer.close()
    status = int(answer.split()[1])
    counts[status] += 1
    if status >= 500:
        problems.append(f"nonsense: {status}")


async def client(seed, expected, until):
    rng = random.Random(seed)
    while time.monotonic() < until:
        kind = rng.random()
        if kind < 0.7:
            await ask(expected, rng)
        elif kind < 0.85:
            await leave(rng)
        elif kind < 0.9:
            await stall(rng)
        else:
            await nonsense(rng)


async def resident_when_idle():
    """Resident memory once nothing is in work and the allocator has had time to give back, idle threads to end."""
    end = time.monotonic()
    while True:
        health = get("/health")
        if health["requests_running"] == 0 and health["requests_waiting"] == 0:
            break
        if time.monotonic() - end > 10:
            problems.append(f"gauges after 10 s: {health}")
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(12)
    return get("/moectl/experts")["memory"]["resident_bytes"]


async def main():
    expected = {prompt: serial(prompt) for prompt in PROMPTS}
    start = time.monotonic()
    # Equal phases: the allocator's own ups and downs are over after two of them.
    sizes = []
    for phase in range(1, 5):
        until = start + phase * SECONDS / 4
        seeds = range(phase * CLIENTS, (phase + 1) * CLIENTS)
        await asyncio.gather(*(client(seed, expected, until) for seed in seeds))
        sizes.append(await resident_when_idle())
        start += 12
    before, after = sizes[1], sizes[3]
    growth = after / before - 1
    if growth > 0.02:
        problems.append(f"resident memory grew by {growth:.1%}")
    print(dict(counts), "resident MiB:", *(size >> 20 for size in sizes))
    for problem in problems[:10]:
        print("FAIL", problem)
    sys.exit(bool(problems))


asyncio.run(main())
