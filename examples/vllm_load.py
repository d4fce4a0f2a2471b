"""Ask servers of vLLM by turns, with more and more clients, and print what they do under load.

    python examples/vllm_load.py plain=http://127.0.0.1:8000 pruned=http://127.0.0.1:8001

The servers serve the same model, one of them with ATP_PATCH_VLLM. Each gets the same questions
about the same generated pictures, none of which is shown twice. They take turns, so that whatever
else the machine does strikes all of them.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import statistics
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from atp_patch.builtin import make_scene

ANSWER_TOKENS = 16
REQUESTS = {1: 16, 8: 48, 32: 96}  # by number of clients


def request_of(number: int) -> list[dict[str, Any]]:
    """The messages of one question about one picture."""
    scene = make_scene("train", number)
    held = io.BytesIO()
    scene.image.save(held, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
    question = scene.questions[number % len(scene.questions)].text
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]


def first_token_s(client: openai.OpenAI, model: str, messages: Any) -> float:
    """Ask, read the whole answer, and return the seconds until its first token."""
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = 0.0
    for part in stream:
        if not first and part.choices and part.choices[0].delta.content:
            first = time.perf_counter() - start
    return first


def metrics(address: str) -> str:
    """What the server says about itself."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def blocks_in_use(address: str) -> float:
    """The number of blocks of the key/value cache that hold running requests."""
    said = metrics(address)
    total = re.search(r'num_gpu_blocks="(\d+)"', said)
    share = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", said, re.MULTILINE)
    assert total, "this vLLM names its metrics otherwise"
    assert share, "this vLLM names its metrics otherwise"
    return float(share[1]) * int(total[1])


def one_turn(address: str, clients: int, numbers: range) -> tuple[float, float, float]:
    """Requests per second, median seconds to the first token, and the most blocks in use."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=900)
    model = client.models.list().data[0].id
    asked = [request_of(number) for number in numbers]
    done, most = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], blocks_in_use(address))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        firsts = list(pool.map(lambda messages: first_token_s(client, model, messages), asked))
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    return len(asked) / took, statistics.median(firsts), most[0]


def main() -> None:
    """Ask all servers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("servers", nargs="+", metavar="NAME=ADDRESS")
    parser.add_argument("--turns", type=int, default=2, help="how often each server is asked")
    options = parser.parse_args()
    servers = dict(text.split("=", 1) for text in options.servers)
    for address in servers.values():
        one_turn(address, 1, range(10_000, 10_004))  # what it does but once
    number = 0
    print("| clients | server | requests/s | first token, median s | KV blocks, most |")
    print("|---|---|---|---|---|")
    for clients, requests in REQUESTS.items():
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in servers}
        for _ in range(options.turns):
            numbers = range(number, number + requests)
            number += requests
            for name, address in servers.items():
                found[name].append(one_turn(address, clients, numbers))
        for name, turns in found.items():
            rate, first, blocks = (statistics.mean(column) for column in zip(*turns, strict=True))
            print(f"| {clients} | {name} | {rate:.2f} | {first:.2f} | {blocks:.0f} |", flush=True)


if __name__ == "__main__":
    main()
