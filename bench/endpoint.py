"""Requests per second to an endpoint at 32 workers: the judge's client beside a thread pool over urllib and bare asyncio loops.

The server is a stub of its own process on this machine. It waits as long as a model would and then answers; what remains is the
cost of the client. Clients take turns within one run, so that whatever else the machine does falls on all of them alike.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from common import Clock, save, spread
from modelwright.core.ask.desk import Desk
from modelwright.core.ask.endpoint import open_endpoint
from modelwright.core.ask.kept import Kept
from modelwright.core.ask.protocol import Prompt

WORKERS, TURNS = 32, 3
CASES = {0.0: 480, 0.2: 320}  # seconds that the server waits -> requests a turn
REPLY = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Output (a)"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 5},
    }
).encode()


async def serve(port: int, wait: float) -> None:
    """The stub: one answer to everything, over connections that stay open unless the client says otherwise."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await asyncio.sleep(wait)
                last = b"connection: close" in head
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
                    % (len(REPLY), b"Connection: close\r\n" if last else b"")
                    + REPLY
                )
                await writer.drain()
                if last:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def body(text: str) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 50, "temperature": 0.0}


def ours(url: str, texts: list[str]) -> int:
    """The judge's client with its counts, its answers kept in memory."""
    desk = Desk(Kept(open_endpoint(url, "m", {"workers": WORKERS})))
    return sum(a.status == "ok" for a in desk(Prompt((("user", t),)) for t in texts))


def threads(url: str, texts: list[str]) -> int:
    """What the judge's client was before: a pool of threads over urllib, a connection for each request."""

    def one(text: str) -> bool:
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body(text)).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return bool(json.loads(response.read())["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(one, texts))


def side_by_side(ask: Callable, texts: list[str]) -> Callable:
    """A coroutine that asks for all texts, 32 at a time."""

    async def work(todo, client) -> int:
        return sum([await ask(client, text) for text in todo])

    async def run(client) -> int:
        todo = iter(texts)
        return sum(await asyncio.gather(*(work(todo, client) for _ in range(WORKERS))))

    return run


def bare_http(url: str, texts: list[str]) -> int:
    """A bare loop over the HTTP library that the openai package uses."""
    import httpx2

    async def ask(client, text: str) -> bool:
        response = await client.post(f"{url}/chat/completions", json=body(text))
        return bool(response.json()["choices"][0]["message"]["content"])

    async def main() -> int:
        async with httpx2.AsyncClient(timeout=60) as client:
            return await side_by_side(ask, texts)(client)

    return asyncio.run(main())


def bare_openai(url: str, texts: list[str]) -> int:
    """A bare loop over the openai package."""
    from openai import AsyncOpenAI

    async def ask(client, text: str) -> bool:
        reply = await client.chat.completions.create(**body(text))
        return bool(reply.choices[0].message.content)

    async def main() -> int:
        async with AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
            return await side_by_side(ask, texts)(client)

    return asyncio.run(main())


CLIENTS = {
    "the judge's client": ours,
    "threads over urllib, as before": threads,
    "bare loop, openai package": bare_openai,
    "bare loop, its HTTP library": bare_http,
}


def started(wait: float) -> tuple[subprocess.Popen, str]:
    """A server in a process of its own, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "serve", str(port), str(wait)])
    for _ in range(300):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}/v1"
        time.sleep(0.05)
    raise TimeoutError("the stub did not start")


def main() -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        os.environ.pop(name, None)
    rows, rates, costs = [], {}, {}
    for wait, n in CASES.items():
        server, url = started(wait)
        try:
            for client in CLIENTS.values():
                client(url, [f"warm {i}" for i in range(WORKERS)])
            for turn in range(TURNS):
                for name, client in CLIENTS.items():
                    texts = [f"{turn} {i}" for i in range(n)]
                    with Clock() as clock:
                        answered = client(url, texts)
                    assert answered == n, (name, answered)
                    rates.setdefault((wait, name), []).append(n / clock.wall)
                    costs.setdefault((wait, name), []).append(1000 * clock.cpu / n)
        finally:
            server.terminate()
            server.wait()
        for name in CLIENTS:
            most = WORKERS / wait if wait else None
            share = f"{100 * median(rates[wait, name]) / most:.0f} %" if most else ""
            rows.append([f"{1000 * wait:.0f} ms", name, spread(rates[wait, name]), share, spread(costs[wait, name])])
    slow, fast = max(CASES), min(CASES)
    of = {name: median(rates[slow, name]) / (WORKERS / slow) for name in CLIENTS}
    at = {name: median(rates[fast, name]) for name in CLIENTS}
    cpu = {name: median(costs[fast, name]) for name in CLIENTS}
    mine, before, bare = (list(CLIENTS)[i] for i in (0, 1, 2))
    met = at[mine] >= at[before]
    save(
        "endpoint",
        claim="With 32 workers the judge's client is not slower than the thread pool over urllib that it replaced, and it adds little to a "
        "bare loop over the same package.",
        outcome=f"The first {'met' if met else 'NOT met'}: {at[mine]:.0f} requests a second against {at[before]:.0f} where the server "
        f"answers at once. The openai package costs {cpu[mine]:.1f} ms of CPU a request, urllib {cpu[before]:.1f} ms. Behind a model "
        f"that takes 200 ms the client reaches {100 * of[mine]:.0f} % of the {WORKERS / slow:.0f} requests a second that 32 workers "
        f"allow (before: {100 * of[before]:.0f} %, a bare loop over the package: {100 * of[bare]:.0f} %). The second: it has "
        f"{100 * at[mine] / at[bare]:.0f} % of the bare loop's rate.",
        columns=["server waits", "client", "requests per second", "of what 32 workers allow", "CPU ms per request, client"],
        rows=rows,
        notes=[
            f"median (min to max) of {TURNS} turns; clients take turns in one run; server and client share the machine's cores",
            f"load of the machine over the last five minutes: {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores",
            "the judge's client also counts, keeps answers by their key and reads them with every check",
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(int(sys.argv[2]), float(sys.argv[3])))
    else:
        main()
